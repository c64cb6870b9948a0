// The condition image of a control model: an image, what is made of it, and the settings of its effect.

import { blob } from "./api.js";
import { Problem, button, dataUrl, dropLine, h, newId, takesDrops } from "./dom.js";
import { fieldFor } from "./fields.js";

// Whether a setting stands with the condition image.
export const ofControl = (name) => name.startsWith("control_") || name === "guess";

export class Control {
  constructor(kinds, settings) {
    this.problem = new Problem();
    const id = newId("kind");
    this.kind = h("select", { id, onchange: () => this.preview() }, kinds.map((name) => h("option", { value: name }, name)));
    this.kind.value = kinds.includes("canny") ? "canny" : kinds[0];
    this.area = h("div", { class: "drop pair" });
    takesDrops(this.area, (file) => this.take(file));
    this.fields = Object.entries(settings)
      .filter(([name]) => ofControl(name))
      .map(([name, schema]) => fieldFor(name, schema));
    this.rest = h("div", { class: "rest" },
      h("div", { class: "grid" }, this.fields.map((field) => field.element)),
      h("div", { class: "row" }, button("Remove", () => this.remove())));
    this.element = h("details", { class: "section", "data-name": "control" },
      h("summary", {}, "Control by a condition image"),
      h("div", { class: "field" }, h("label", { htmlFor: id }, "Kind"), this.kind),
      this.area, this.rest, this.problem.element);
    this.remove();
  }

  remove() {
    this.url = undefined;
    this.problem.show("");
    this.rest.hidden = true;
    this.area.replaceChildren(dropLine((file) => this.take(file)));
  }

  async take(file) {
    this.url = await dataUrl(file);
    this.rest.hidden = false;
    await this.preview();
  }

  // Show what the control model will see.
  async preview() {
    if (!this.url) return;
    const { url, kind: { value: kind } } = this;
    this.area.replaceChildren(h("img", { src: url, alt: "The given image" }));
    await this.problem.guard(async () => {
      const made = await blob("/v1/conditions", { method: "POST", body: { kind, image: url } });
      if (this.url !== url || this.kind.value !== kind) return;
      this.area.append(h("img", { src: await dataUrl(made), alt: `The condition image: ${kind}` }));
    });
  }

  values() {
    if (!this.url) return {};
    const found = { control: { [this.kind.value]: this.url } };
    for (const field of this.fields) {
      const value = field.get();
      if (value !== undefined) found[field.name] = value;
    }
    return found;
  }
}
