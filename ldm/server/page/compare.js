// The tab that compares: a grid of one setting's values, or of two, each of its cells a job.

import { AxisPicker } from "./axes.js";
import { Problem, button, h, saveFile } from "./dom.js";
import { GalleryImage, viewOf } from "./gallery.js";
import { Jobs, isOver } from "./jobs.js";
import { Place } from "./place.js";
import { png, sheet } from "./sheet.js";

const SAVED = "ldm-grid";
const AT_ONCE = 4; // jobs at the server
const STREAMS = 2; // beside those of the other tab
const MOST = 100; // cells
const AGAIN_MS = 2000; // until a server that takes no more jobs is asked again

class Compare {
  constructor(panel, app) {
    this.app = app;
    this.cells = [];
    this.jobs = new Jobs(SAVED, STREAMS, (job) => this.cells[job.cell]?.begin(job), (job) => this.changed(job));
    this.columns = new AxisPicker("Columns", app);
    this.rows = new AxisPicker("Rows", app);
    this.problem = new Problem();
    this.make = h("button", { type: "submit", class: "main", title: "Ctrl+Enter" }, "Make grid");
    this.cancelling = button("Cancel all", () => this.cancel(), { title: "Escape", hidden: true });
    this.downloading = button("Download sheet", () => this.problem.guard(() => this.download()), { title: "The whole grid with its labels as one PNG", hidden: true });
    this.count = h("p", { class: "quiet", role: "status" });
    this.prompt = h("span", {});
    this.table = h("table", { class: "cells" });
    this.scroller = h("div", { class: "scroller", tabIndex: 0, role: "region", "aria-label": "Grid", hidden: true }, this.table);
    panel.append(
      h("form", { class: "comparing", "aria-label": "Grid", noValidate: true, onsubmit: (event) => {
        event.preventDefault();
        this.begin();
      } },
        h("div", { class: "axes" }, this.columns.element, this.rows.element),
        h("p", { class: "quiet" }, "All other settings are those of the form: ", this.prompt, " ",
          button("Change", () => app.open("generate"), { class: "link" })),
        this.problem.element,
        h("div", { class: "row" }, this.make, this.cancelling, this.downloading, this.count)),
      this.scroller);
    this.restore();
  }

  shown() {
    const text = this.app.views.generate.form.prompt.control.value.trim();
    this.prompt.textContent = text ? `“${text}”` : "no prompt yet";
  }

  // --- making ---------------------------------------------------------------------------------------------------------

  // Make the grid that is asked for; what is wrong with it is shown where it belongs.
  begin() {
    if (this.left.length) return;
    this.problem.show("");
    const axes = [this.columns, this.rows].map((picker) => picker.get());
    if (axes.includes(undefined)) return;
    const [columns, rows] = axes;
    try {
      this.check(columns.length * rows.length);
    } catch (error) {
      this.problem.show(error.message);
      return;
    }
    const base = this.base();
    const bodies = base && this.bodies(base, columns, rows);
    if (!bodies) return;
    this.show(columns.map(({ label }) => label), this.rows.axis ? rows.map(({ label }) => label) : []);
    this.jobs.all = [];
    for (const [number, body] of bodies.entries()) this.cells[number].ask(body);
    this.save(base.seed);
    this.next();
  }

  check(count) {
    const [across, down] = [this.columns.axis, this.rows.axis];
    if (!across) throw new Error("choose a setting for the columns");
    const both = across.sets.filter((name) => down?.sets.includes(name));
    if (both.length) throw new Error(`columns and rows both set ${both[0]}; change one of them`);
    if (count > MOST) throw new Error(`${count.toLocaleString("en")} cells; at most ${MOST} can be made`);
  }

  // The settings of all cells, with one seed; undefined if something is wrong with them, which the form then shows.
  base() {
    const { generate } = this.app.views;
    const prompted = [this.columns, this.rows].some(({ axis }) => axis?.name === "prompt");
    const found = generate.form.values(prompted);
    if (!found) {
      this.app.open("generate");
      return undefined;
    }
    const { n, batch, seed = Math.floor(Math.random() * 2 ** 32), ...body } = found;
    return generate.request({ ...body, seed });
  }

  // The settings of each cell, row after row. Words are replaced last, in the prompts that the cells have.
  bodies(base, columns, rows) {
    const late = this.columns.axis.name === "replace";
    try {
      return rows.flatMap((row) => columns.map((column) => (late ? column.put(row.put(base)) : row.put(column.put(base)))));
    } catch (error) {
      (late ? this.columns : this.rows).wrong(error.message);
      return undefined;
    }
  }

  // Cells that are on their way, or are to be.
  get left() {
    return this.cells.filter((cell) => !cell.over);
  }

  // Submit as many cells as may be at the server at a time.
  next() {
    clearTimeout(this.later);
    const waiting = this.left.filter((cell) => !cell.sent);
    const free = AT_ONCE - (this.left.length - waiting.length);
    for (const cell of waiting.slice(0, Math.max(free, 0))) this.submit(cell);
    this.tell();
  }

  async submit(cell) {
    cell.sent = true;
    try {
      const job = await this.jobs.submit(cell.job.body, this.cells.indexOf(cell));
      if (cell.job !== job) await this.jobs.cancel(job); // it was cancelled meanwhile
    } catch (error) {
      if ([0, 503].includes(error.status)) {
        cell.sent = false;
        this.later = setTimeout(() => this.next(), AGAIN_MS);
        return;
      }
      cell.end("failed", error.message);
      this.next();
    }
  }

  changed(job) {
    const cell = this.cells[job.cell];
    if (cell?.job !== job) return; // of a grid before
    cell.follow();
    if (cell.over) this.next();
  }

  async cancel(cells = this.left) {
    for (const cell of cells) if (!cell.job.id) cell.end("cancelled");
    this.next();
    try {
      await Promise.all(cells.filter((cell) => !cell.over).map((cell) => this.jobs.cancel(cell.job)));
    } catch (error) {
      this.problem.show(error.message);
    }
  }

  // --- the table ------------------------------------------------------------------------------------------------------

  // A table with these labels and empty cells; without labels of rows it has one row.
  show(columns, rows) {
    this.cells.forEach((cell) => cell.image?.forget());
    this.labels = { columns, rows };
    this.cells = Array.from({ length: columns.length * Math.max(rows.length, 1) }, () => new Cell(this));
    const head = (label, scope) => h("th", { scope }, h("span", {}, label));
    const lines = rows.length ? rows : [""];
    this.table.replaceChildren(
      h("thead", {}, h("tr", {}, rows.length > 0 && h("td", {}), columns.map((label) => head(label, "col")))),
      h("tbody", {}, lines.map((label, row) => h("tr", {}, label && head(label, "row"),
        this.cells.slice(row * columns.length, (row + 1) * columns.length).map((cell) => cell.place)))));
    this.scroller.hidden = false;
  }

  tell() {
    const made = this.cells.filter((cell) => cell.image).length;
    const running = this.left.length > 0;
    this.make.disabled = running;
    this.cancelling.hidden = !running;
    this.downloading.hidden = !made;
    if (this.running && !running) this.app.announce(`The grid is done: ${made} of ${this.cells.length} images.`);
    this.running = running;
    this.count.textContent = this.cells.length ? `${made} of ${this.cells.length} images` : "";
  }

  async download() {
    const images = new Map();
    for (const [number, { image }] of this.cells.entries()) {
      if (!image) continue;
      const shown = h("img", { src: await image.load() });
      await shown.decode();
      images.set(number, shown);
    }
    saveFile(await png(sheet(images, this.labels.columns, this.labels.rows)), `grid-${this.seed}.png`);
  }

  // --- kept while the tab is open -------------------------------------------------------------------------------------

  save(seed) {
    this.seed = seed;
    sessionStorage.setItem(`${SAVED}-axes`, JSON.stringify({
      ...this.labels, seed: String(seed), axes: [this.columns.state, this.rows.state],
    }));
  }

  async restore() {
    const saved = JSON.parse(sessionStorage.getItem(`${SAVED}-axes`) ?? "null");
    if (!saved) return;
    [this.columns.state, this.rows.state] = saved.axes;
    this.seed = saved.seed;
    this.show(saved.columns, saved.rows);
    await this.jobs.restore();
    for (const cell of this.left) if (!cell.job.id) cell.end("cancelled");
    this.tell();
  }
}

// A cell of the grid: the place of its image, and then the image.
class Cell {
  constructor(grid) {
    this.grid = grid;
    this.place = h("td", {});
    this.stand({});
    this.sent = true; // there is nothing to send yet
  }

  // Stand for settings that no job has yet.
  stand(body) {
    this.sent = false;
    this.job = { body, state: { state: "waiting", images: [] }, steps: new Map(), previews: [] };
  }

  get over() {
    return isOver(this.job.state);
  }

  ask(body) {
    this.stand(body);
    this.showPlace();
  }

  // Follow a job, unless the cell was cancelled before the server had it.
  begin(job) {
    if (this.over) return;
    this.job = job;
    this.sent = true;
    this.showPlace();
  }

  showPlace() {
    this.waiting = new CellPlace(this.job, 0, () => this.grid.cancel([this]));
    this.waiting.makeAgain = this.job.body.prompt && !this.job.body.lost ? () => this.again() : undefined;
    this.place.replaceChildren(this.waiting.element);
    this.follow();
  }

  follow() {
    const [made] = this.job.state.images;
    if (!made) {
      this.waiting.update();
    } else if (!this.image) {
      this.image = new GalleryImage(made.url, { file: `${made.seed}.png` });
      this.image.body = this.job.body;
      this.fill().catch((error) => this.place.append(h("p", { class: "problem" }, error.message)));
    }
  }

  async fill() {
    const view = viewOf(this.image, this.grid.app.views.generate.acts);
    view.firstChild.src = await this.image.load();
    this.place.replaceChildren(view);
  }

  end(state, error = "") {
    this.job.state = { state, error, images: [] };
    if (!this.waiting) this.showPlace();
    this.follow();
  }

  // Make a cell that was cancelled or has failed.
  again() {
    this.ask(this.job.body);
    this.grid.next();
  }
}

class CellPlace extends Place {
  makeClosing() {
    return this.makeAgain ? button("Make", this.makeAgain) : h("span", {});
  }
}

export const compare = {
  name: "compare",
  title: "Compare",
  View: Compare,
};
