// The reports of evaluations of a run: their figures, and their pages.

import { blob, hasKey, json } from "./api.js";
import { Problem, button, h, saveFile } from "./dom.js";

// The heads of the columns of a table of figures.
const COLUMNS = ["metric", "", "value", "corrected", "95 % interval", "images", "p"];

function rows(row) {
  const count = row.lines.length + (row.verdict ? 1 : 0);
  const name = h("th", { scope: "rowgroup", rowSpan: count }, row.label, row.better && h("small", { class: "quiet" }, `${row.better} is better`));
  const lines = row.lines.map((line, place) => h("tr", {}, place === 0 && name, h("th", { scope: "row" }, line.name),
    ["value", "corrected", "interval", "count", "p"].map((key) => h("td", {}, line[key]))));
  const verdict = row.verdict && h("tr", {}, h("td", { colSpan: COLUMNS.length - 1, class: "verdict" }, row.verdict));
  return h("tbody", {}, lines, verdict);
}

function table({ heading, rows: metrics }) {
  const notes = [...new Set(metrics.flatMap(({ label, notes: own }) => own.map((note) => `${label}: ${note}`)))];
  return [h("h4", {}, heading),
    h("div", { class: "wide", tabIndex: 0, role: "group", "aria-label": `Figures of ${heading}` },
      h("table", {}, h("thead", {}, h("tr", {}, COLUMNS.map((name) => h(name ? "th" : "td", name ? { scope: "col" } : {}, name)))), metrics.map(rows))),
    notes.length > 0 && h("ul", { class: "notes" }, notes.map((note) => h("li", {}, note)))];
}

function side({ name, source, count, settings }) {
  const more = Object.entries(settings).map(([key, value]) => `${key} ${value}`).join(", ");
  return [h("dt", {}, name), h("dd", {}, `${source}, ${count.toLocaleString("en")} images${more ? `; ${more}` : ""}`)];
}

// The figures of a report as elements.
function figures(report) {
  return [
    h("dl", {}, [...report.sides, ...(report.reference ? [report.reference] : [])].map(side)),
    report.tables.map(table),
    report.notes.length > 0 && h("ul", { class: "notes" }, report.notes.map((note) => h("li", {}, note))),
  ].flat(3).filter(Boolean);
}

// One report: its figures are asked for when it is opened.
function reportOf(address, { name, page }) {
  const problem = new Problem();
  const body = h("div", { class: "report" });
  const found = h("details", { class: "section", ontoggle: async () => {
    if (!found.open || body.childElementCount) return;
    try {
      body.replaceChildren(...figures(await json(address)));
      problem.show("");
    } catch (error) {
      problem.show(error.message);
    }
  } }, h("summary", {}, name), page && pageLink(`${address}/page`, name, problem), problem.element, body);
  return found;
}

// A link to a report's page. A browser sends no key with a link, so with one the page is saved as a file.
function pageLink(address, name, problem) {
  if (!hasKey()) {
    return h("p", {}, h("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, "Open the whole report"), " with its images");
  }
  const save = async () => saveFile(await blob(address), `${name.replaceAll(/[^\w-]+/g, "-")}.html`);
  return h("p", {}, button("Save the whole report", () => problem.guard(save), { class: "link" }), " with its images, as a file");
}

export class Reports {
  // `address` is that of the run.
  constructor(address) {
    this.address = address;
    this.known = new Set();
    this.list = h("div", { class: "rows" });
    this.element = h("div", { class: "reports", hidden: true }, h("h3", {}, "Evaluations"), this.list);
  }

  set(reports) {
    const fresh = reports.filter(({ id }) => !this.known.has(id));
    this.list.prepend(...fresh.map((report) => reportOf(`${this.address}/reports/${report.id}`, report)));
    for (const { id } of fresh) this.known.add(id);
    this.element.hidden = !this.known.size;
    if (this.known.size === 1 && fresh.length === 1) this.list.firstElementChild.open = true;
  }
}
