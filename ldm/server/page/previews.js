// The previews of a stage, step by step.

import { blob } from "./api.js";
import { Problem, button, h, newId } from "./dom.js";

const KEPT = 24; // images at a time

export class Previews {
  // `address` is that of the stage.
  constructor(address) {
    this.address = address;
    this.images = new Map(); // address -> object URL
    this.problem = new Problem();
    const id = newId("preview");
    this.range = h("input", { type: "range", id, min: 0, step: 1, oninput: () => this.show() });
    this.output = h("output", { htmlFor: id });
    this.image = h("img", { class: "large-preview", alt: "" });
    this.element = h("div", { class: "previews", hidden: true },
      h("h3", {}, "Previews"),
      h("div", { class: "row joined" }, button("‹", () => this.move(-1), { class: "icon", "aria-label": "Earlier preview" }),
        h("label", { htmlFor: id, class: "unseen" }, "Preview"), this.range,
        button("›", () => this.move(1), { class: "icon", "aria-label": "Later preview" }), this.output),
      this.problem.element, this.image);
  }

  // Show the previews of these steps, and the sheet at the end if there is one; who looks at the last one sees the new.
  set(steps, sheet) {
    const entries = [...steps.map((step) => ({ path: `previews/${step}`, text: `step ${step.toLocaleString("en")}` })),
      ...(sheet ? [{ path: "sheet", text: "the finished adapter" }] : [])];
    if (entries.length === this.entries?.length) return;
    const last = !this.entries || Number(this.range.value) === this.entries.length - 1;
    this.entries = entries;
    this.element.hidden = !entries.length;
    this.range.max = Math.max(entries.length - 1, 0);
    if (last) this.range.value = this.range.max;
    if (entries.length) this.show();
  }

  move(by) {
    this.range.value = Number(this.range.value) + by;
    this.show();
  }

  async show() {
    const { path, text } = this.entries[Number(this.range.value)];
    this.output.textContent = text;
    this.range.setAttribute("aria-valuetext", text);
    const asked = (this.asked = path);
    try {
      const url = await this.load(path);
      if (asked !== this.asked) return; // another one is wanted meanwhile
      this.image.src = url;
      this.image.alt = `Preview: ${text}`;
      this.problem.show("");
    } catch (error) {
      if (asked === this.asked) this.problem.show(error.message);
    }
  }

  async load(path) {
    if (!this.images.has(path)) this.images.set(path, URL.createObjectURL(await blob(`${this.address}/${path}`)));
    for (const old of [...this.images.keys()].slice(0, -KEPT)) {
      if (old === path) continue;
      URL.revokeObjectURL(this.images.get(old));
      this.images.delete(old);
    }
    return this.images.get(path);
  }

  forget() {
    for (const url of this.images.values()) URL.revokeObjectURL(url);
    this.images.clear();
  }
}
