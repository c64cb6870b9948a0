// The image to start from, how much of it changes, margins that extend it, and a mask painted on it.

import { Problem, button, dataUrl, dropLine, h, newId, takesDrops } from "./dom.js";
import { Margins } from "./margins.js";
import { MaskPainter, surfaceOf } from "./mask.js";

const USUAL = 0.8;
const USUAL_MASKED = 1;

export class StartImage {
  // `settings` are the schemas of all settings.
  constructor(settings, changed) {
    this.changed = changed;
    this.margins = new Margins(settings.margins, () => this.marginsChanged());
    this.problem = new Problem();
    const id = newId("strength");
    this.range = h("input", {
      id, type: "range", min: 0.05, max: 1, step: 0.05, value: USUAL,
      oninput: () => {
        this.touched = true;
        this.showStrength();
      },
    });
    this.output = h("output", { htmlFor: id, "aria-live": "off" });
    this.strength = h("div", { class: "slider", title: "How much the image changes" },
      h("label", { htmlFor: id }, "Strength"), this.range, this.output);
    this.area = h("div", { class: "drop" });
    takesDrops(this.area, (file) => this.take(file));
    this.toggle = button("Paint a mask", () => this.mask(!this.painter), { "aria-pressed": "false" });
    this.rest = h("div", { class: "rest" },
      this.strength, this.margins.element, h("div", { class: "row" }, this.toggle, button("Remove", () => this.remove())));
    this.element = h("details", { class: "section", "data-name": "image" },
      h("summary", {}, "Start from an image"), this.area, this.rest, this.problem.element);
    this.showNone();
  }

  showNone() {
    this.image = this.painter = undefined;
    this.touched = false;
    this.margins.set(undefined);
    this.area.replaceChildren(dropLine((file) => this.take(file)));
    this.rest.hidden = true;
  }

  async take(file) {
    try {
      await this.show(await dataUrl(file));
    } catch {
      this.problem.show(`${file.name ?? "the file"} is no image that this browser reads`);
    }
  }

  // Show an image by its data URL.
  async show(url) {
    const image = h("img", { src: url, alt: "The image to start from", draggable: false });
    await image.decode();
    this.problem.show("");
    this.image = image;
    this.painter = undefined;
    this.toggle.setAttribute("aria-pressed", "false");
    this.area.replaceChildren(this.margins.around(surfaceOf(image), image));
    this.rest.hidden = false;
    this.element.open = true;
    this.showStrength();
    this.changed();
  }

  remove() {
    this.showNone();
    this.changed();
    this.element.querySelector("summary").focus();
  }

  mask(wanted) {
    this.painter = wanted ? new MaskPainter(this.image, this.changed) : undefined;
    const surface = this.painter?.surface ?? surfaceOf(this.image);
    this.area.replaceChildren(this.margins.around(surface, this.image), ...(wanted ? [this.painter.tools] : []));
    this.toggle.setAttribute("aria-pressed", wanted);
    this.showStrength();
    if (wanted) this.painter.canvas.focus({ preventScroll: true });
  }

  showStrength() {
    if (!this.touched) this.range.value = this.painter || this.margins.some ? USUAL_MASKED : USUAL;
    this.output.textContent = Number(this.range.value).toFixed(2);
  }

  setStrength(value) {
    this.touched = true;
    this.range.value = value;
    this.showStrength();
  }

  marginsChanged() {
    this.problem.show("");
    this.showStrength();
    this.changed();
  }

  setMargins(value) {
    this.margins.set(value);
    this.showStrength();
  }

  // The settings of a request that belong to the image.
  values() {
    this.problem.show("");
    if (!this.image) return {};
    const margins = this.margins.get();
    if (this.painter?.empty && !margins) throw new Error("paint what is to be made anew, or put the mask away");
    const mask = this.painter && !this.painter.empty ? { mask: this.painter.url() } : {};
    return { image: this.image.src, strength: Number(this.range.value), ...mask, ...(margins ? { margins } : {}) };
  }

  problemOf(text) {
    this.element.open = true;
    this.problem.show(text);
  }
}
