// The place of an image that is on its way.

import { Problem, button, h } from "./dom.js";
import { isOver } from "./jobs.js";

// The place of an image that is on its way, with its preview.
export class Place {
  constructor(job, number, cancel) {
    this.job = job;
    this.number = number;
    const { width = 1, height = 1 } = job.body;
    this.preview = h("img", { alt: "", class: "preview", hidden: true });
    this.frame = h("div", { class: "frame" }, this.preview);
    this.frame.style.aspectRatio = `${width} / ${height}`;
    this.bar = h("progress", { max: 1, "aria-label": "Progress" });
    this.text = h("span", {});
    this.cancelling = button("Cancel", cancel);
    this.problem = new Problem();
    this.element = h("figure", { class: "card waiting" }, this.frame, this.bar,
      h("figcaption", {}, this.text, this.cancelling), this.problem.element);
  }

  update() {
    const { job, number } = this;
    const [step, steps] = job.steps.get(number) ?? [0, 1];
    const { state, error } = job.state;
    if (job.previews[number]) {
      this.preview.src = job.previews[number];
      this.preview.hidden = false;
    }
    this.bar.value = step / steps;
    const running = step ? `step ${step} of ${steps}` : "begins";
    this.text.textContent = job.lost ? "the server does not answer; trying again" : state === "running" ? running : state;
    if (!isOver(job.state)) return;
    this.cancelling.remove();
    this.bar.hidden = true;
    this.frame.hidden = !job.previews[number];
    if (!this.closing) {
      this.closing = this.makeClosing();
      this.element.querySelector("figcaption").append(this.closing);
    }
    if (state === "failed") this.problem.show(error);
  }

  // The button of a place that gets no image.
  makeClosing() {
    return button("×", () => this.element.remove(), { class: "icon", "aria-label": "Put away" });
  }
}
