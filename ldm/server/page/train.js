// The tab of runs of training: how far they are, their curves, previews and evaluations, kept up to date.

import { json } from "./api.js";
import { short } from "./chart.js";
import { CurveCharts } from "./curves.js";
import { Problem, button, h } from "./dom.js";
import { Previews } from "./previews.js";
import { Reports } from "./reports.js";
import { TrainForm, Training } from "./train_form.js";

const LIST_MS = 10_000; // between looks at all runs
const RUN_MS = 4_000; // between looks at the run that is open
const CHOSEN = "ldm-run";
const FIGURES = 10; // of the last line that are shown

// A duration in words: "50 min", "3 h 20 min".
function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  if (seconds < 90) return `${Math.max(Math.round(seconds), 1)} s`;
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.round(minutes / 60);
  return hours < 48 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

// How far a run is, in a few words.
function summary(run) {
  const stage = run.stages.find(({ state }) => state !== "done") ?? run.stages.at(-1);
  if (!stage) return run.state === "done" ? "evaluation" : run.state === "running" ? "begins" : run.state;
  if (run.state === "done") return `done, ${stage.step.toLocaleString("en")} steps`;
  const left = run.state === "running" && stage.seconds_left !== null ? `, ${duration(stage.seconds_left)} left` : "";
  const of = stage.steps === null ? "" : ` of ${stage.steps.toLocaleString("en")}`;
  return `${run.state}, step ${stage.step.toLocaleString("en")}${of}${left}`;
}

function partDone(run) {
  const steps = run.stages.reduce((sum, stage) => sum + (stage.steps ?? 0), 0);
  const done = run.stages.reduce((sum, stage) => sum + (stage.state === "done" ? stage.steps ?? 0 : stage.step), 0);
  return steps ? Math.min(done / steps, 1) : 0;
}

// --- one run ------------------------------------------------------------------------------------------------------------

class StageView {
  constructor(address) {
    this.address = address;
    this.line = h("p", {});
    this.progress = h("progress", { max: 1 });
    this.figures = h("dl", { class: "figures" });
    this.problem = new Problem();
    this.curves = new CurveCharts();
    this.previews = new Previews(address);
    this.heading = h("h3", {});
    this.element = h("section", { class: "stage" }, this.heading, this.line, this.progress, this.figures, this.problem.element,
      this.previews.element, this.curves.element);
  }

  set(stage, alone) {
    const step = stage.step.toLocaleString("en");
    const left = stage.state === "running" && stage.seconds_left !== null
      ? `about ${duration(stage.seconds_left)} left, without previews and evaluations` : undefined;
    this.heading.textContent = `Stage ${stage.name}`;
    this.heading.classList.toggle("unseen", alone);
    this.line.textContent = [
      stage.state === "waiting" ? "not begun" : stage.state,
      stage.steps === null ? `step ${step}` : `step ${step} of ${stage.steps.toLocaleString("en")}`,
      stage.images_per_second !== null && `${short(stage.images_per_second)} images a second`, left,
      stage.checkpoint !== null && stage.state !== "done" && `checkpoint at step ${stage.checkpoint.toLocaleString("en")}`,
    ].filter(Boolean).join(" · ");
    this.progress.hidden = stage.steps === null;
    this.progress.value = stage.state === "done" ? 1 : stage.step / (stage.steps ?? 1);
    this.progress.setAttribute("aria-label", `Progress of ${stage.name}`);
    this.figures.replaceChildren(...Object.entries(stage.figures).filter(([name]) => !/^(gradient\/|learning_rate|tflops|model_flops_use|images_per_s)/.test(name))
      .slice(0, FIGURES).flatMap(([name, value]) => [h("div", {}, h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, name === "waiting" ? `${Math.round(100 * value)} %` : short(value)))]));
    this.previews.set(stage.previews, stage.sheet);
    if (stage.log !== this.size) this.loadCurves(stage.log);
  }

  async loadCurves(size) {
    this.size = size;
    try {
      this.curves.set(await json(`${this.address}/curves`));
      this.problem.show("");
    } catch (error) {
      this.problem.show(error.message);
    }
  }
}

class RunView {
  constructor(id, app) {
    this.address = `/v1/runs/${id}`;
    this.id = id;
    this.training = new Training(this.address, app.about.keeps, () => this.look());
    this.title = h("h2", {});
    this.state = h("p", { class: "quiet" });
    this.problem = new Problem();
    this.reports = new Reports(this.address);
    this.stages = new Map();
    this.parts = h("div", { class: "stages" });
    this.element = h("article", { class: "run" }, this.title, this.state, this.problem.element, this.training.element, this.parts, this.reports.element);
  }

  // Ask for the state, and show it.
  async look() {
    try {
      this.set(await json(this.address));
      this.problem.show("");
    } catch (error) {
      this.problem.show(error.message);
    }
  }

  set(run) {
    this.run = run;
    this.title.textContent = run.name;
    this.state.textContent = this.told(run);
    this.state.hidden = !this.state.textContent;
    for (const stage of run.stages) {
      if (!this.stages.has(stage.name)) {
        const view = new StageView(`${this.address}/stages/${stage.name}`);
        this.stages.set(stage.name, view);
        this.parts.append(view.element);
      }
      this.stages.get(stage.name).set(stage, run.stages.length === 1);
    }
    this.training.set(run);
    this.reports.set(run.reports);
  }

  told(run) {
    if (run.state === "running") return `Running: files changed ${duration(run.quiet)} ago.`;
    if (run.state === "done") return "";
    if (run.state === "failed") return "The program ended with an error.";
    if (run.patience === null) return "Stopped.";
    return `Stopped, or not heard of: no file has changed for ${duration(run.quiet)}. A run counts as running while `
      + `something changes every ${duration(run.patience)}.`;
  }

  forget() {
    for (const stage of this.stages.values()) stage.previews.forget();
  }
}

// --- all runs -----------------------------------------------------------------------------------------------------------

class Train {
  constructor(panel, app) {
    this.panel = panel;
    this.app = app;
    this.problem = new Problem();
    this.items = new Map(); // id -> {element, …}
    this.list = h("ul", { class: "run-list", "aria-label": "Runs" });
    this.none = h("p", { class: "quiet", hidden: true }, "There are no runs in the folder yet.");
    this.more = h("p", { class: "quiet", hidden: true });
    this.fresh = button("New adapter …", () => this.openForm(), { hidden: !app.about.trains });
    this.aside = h("div", { class: "run-side" }, this.problem.element, this.fresh, this.list, this.none, this.more);
    this.main = h("div", { class: "run-main" });
    panel.append(this.aside, this.main);
  }

  get isShown() {
    return !this.panel.hidden && !document.hidden;
  }

  // Look now, and from then on while the tab is shown.
  async shown() {
    if (this.timers) return this.look();
    this.timers = [
      setInterval(() => this.isShown && this.look(), LIST_MS),
      setInterval(() => this.isShown && this.view?.run?.state === "running" && this.view.look(), RUN_MS),
    ];
    return this.look();
  }

  async look() {
    try {
      this.set(await json("/v1/runs"));
      this.problem.show("");
    } catch (error) {
      this.problem.show(error.message);
    }
  }

  set({ runs, total }) {
    const there = new Set(runs.map(({ id }) => id));
    for (const [id, item] of this.items) {
      if (!there.has(id)) {
        item.element.remove();
        this.items.delete(id);
      }
    }
    runs.forEach((run, place) => {
      const item = this.items.get(run.id) ?? this.item(run.id);
      item.name.textContent = run.name;
      item.text.textContent = summary(run);
      item.dot.className = `dot ${run.state}`;
      item.progress.hidden = run.state === "done";
      item.progress.value = partDone(run);
      if (this.list.children[place] !== item.element) this.list.insertBefore(item.element, this.list.children[place] ?? null);
    });
    this.none.hidden = runs.length > 0;
    this.more.hidden = total === runs.length;
    this.more.textContent = `${(total - runs.length).toLocaleString("en")} runs that changed earlier are not shown.`;
    const wanted = this.view?.id ?? sessionStorage.getItem(CHOSEN);
    if (this.form?.element.isConnected) return;
    if (!this.view && runs.length) this.choose(there.has(wanted) ? wanted : runs[0].id);
    else if (this.view && this.view.run?.state !== "running") this.view.look();
  }

  item(id) {
    const item = {
      dot: h("span", { class: "dot", "aria-hidden": "true" }), name: h("span", { class: "name" }), text: h("span", { class: "quiet" }),
      progress: h("progress", { max: 1, "aria-hidden": "true" }),
    };
    item.button = h("button", { type: "button", onclick: () => this.choose(id) }, item.dot, item.name, item.text, item.progress);
    item.element = h("li", {}, item.button);
    this.items.set(id, item);
    return item;
  }

  openForm() {
    this.form ??= new TrainForm(async (id) => {
      this.form = undefined;
      await this.look();
      this.choose(id);
      this.app.announce("The training has begun.");
    });
    this.put(this.form.element);
  }

  choose(id) {
    if (this.view?.id === id) return;
    const view = new RunView(id, this.app);
    this.put(view.element, view);
    sessionStorage.setItem(CHOSEN, id);
    view.look();
  }

  // Show an element, that of the view if it is a run's, in place of the one before.
  put(element, view) {
    this.view?.forget();
    this.view = view;
    this.main.replaceChildren(element);
    for (const [id, item] of this.items) item.button.setAttribute("aria-pressed", id === view?.id);
  }
}

export const train = {
  name: "train",
  title: "Train",
  View: Train,
  lacks: ({ runs }) => !runs && "This server shows no runs of training. Start it with: ldm serve --runs FOLDER",
};
