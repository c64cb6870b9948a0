// The figures of a stage's log, grouped into charts.

import { Chart } from "./chart.js";
import { h, newId } from "./dom.js";

const MACHINE = ["learning_rate", "images_per_s", "waiting", "tflops", "model_flops_use"];
const TITLES = {
  loss: "Loss", gradient: "Norm of the gradient", learning_rate: "Learning rate", images_per_s: "Images a second",
  waiting: "Part of the time spent waiting for data", tflops: "TFLOP/s", model_flops_use: "Part of the device's peak speed",
  psnr: "PSNR", ssim: "SSIM", lpips: "LPIPS", kl: "KL divergence", kid: "KID", fid: "FID",
};
const ORDER = ["loss", "validation", "evaluation", "part", "gradient", "machine"]; // kinds of groups

// The group of a figure, what kind it is of, and the name of its curve there.
function placeOf(name) {
  const parts = name.split("/");
  const [kind] = parts;
  if (kind === "loss") return { group: "loss", kind, curve: parts.slice(1).join("/") || "training" };
  if (kind === "gradient") return { group: "gradient", kind, curve: parts.slice(1).join("/") };
  if (kind === "validation" && parts[1] === "loss") return { group: "loss", kind: "loss", curve: "validation" };
  if (kind === "validation") return { group: parts.slice(1).join("/"), kind, curve: "validation" };
  if (kind === "evaluation") return { group: parts.at(-1), kind, curve: parts.slice(1, -1).join("/") || "evaluation" };
  return { group: name, kind: MACHINE.includes(name) ? "machine" : "part", curve: "training" };
}

// Groups of curves: [{key, title, kind, series}], the most important first.
function grouped(curves) {
  const groups = new Map();
  for (const [name, points] of Object.entries(curves)) {
    const { group, kind, curve } = placeOf(name);
    const key = kind === "evaluation" ? `evaluation/${group}` : group;
    if (!groups.has(key)) groups.set(key, { key, title: TITLES[group] ?? group, kind, series: [] });
    groups.get(key).series.push({ name: curve, points });
  }
  return [...groups.values()].sort((a, b) => ORDER.indexOf(a.kind) - ORDER.indexOf(b.kind));
}

// All charts of a stage.
export class CurveCharts {
  constructor() {
    this.charts = new Map();
    const id = newId("log");
    this.log = h("input", { type: "checkbox", id, onchange: () => this.redraw() });
    this.note = h("p", { class: "quiet" });
    this.main = h("div", { class: "charts" });
    this.machine = h("div", { class: "charts" });
    this.more = h("details", { class: "section" }, h("summary", {}, "Speed, learning rate, gradients"), this.machine);
    this.element = h("div", { class: "curves", hidden: true },
      h("div", { class: "row" }, h("h3", {}, "Curves"), h("span", { class: "flag" }, this.log, h("label", { htmlFor: id }, "Logarithmic"))),
      this.main, this.more, this.note);
  }

  // Show an answer of the server.
  set({ curves, damaged, sampled }) {
    const groups = grouped(curves);
    this.element.hidden = !groups.length;
    for (const { key, title, kind, series } of groups) {
      if (!this.charts.has(key)) {
        const chart = new Chart(title);
        chart.log = this.log.checked;
        this.charts.set(key, chart);
        (["machine", "gradient"].includes(kind) ? this.machine : this.main).append(chart.element);
      }
      this.charts.get(key).set(series);
    }
    this.more.hidden = !this.machine.childElementCount;
    this.note.textContent = [
      sampled && "The log is very long: the curves are of parts of it.",
      damaged > 0 && `${damaged.toLocaleString("en")} lines of the log cannot be read.`,
    ].filter(Boolean).join(" ");
    this.note.hidden = !this.note.textContent;
  }

  redraw() {
    for (const chart of this.charts.values()) {
      chart.log = this.log.checked;
      chart.draw();
    }
  }
}
