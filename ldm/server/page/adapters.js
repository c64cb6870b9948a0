// Adapters by name, each with a slider for its weight.

import { button, h, newId } from "./dom.js";

export class AdapterSliders {
  constructor(names, changed) {
    this.names = names;
    this.changed = changed;
    this.weights = new Map(); // name -> weight, or an object of weights
    const id = newId("adapter");
    this.choice = h("select", { id, onchange: () => this.add(this.choice.value) });
    this.rows = h("div", { class: "rows" });
    this.element = h("div", { class: "field" }, h("label", { htmlFor: id }, "Adapters"), this.choice, this.rows);
    this.show();
  }

  add(name, weight = 1) {
    if (name) this.weights.set(name, weight);
    this.show();
    this.changed();
  }

  set(weights = {}) {
    this.weights = new Map(Object.entries(weights));
    this.show();
  }

  get() {
    return this.weights.size ? Object.fromEntries(this.weights) : undefined;
  }

  show() {
    const left = this.names.filter((name) => !this.weights.has(name));
    this.choice.replaceChildren(h("option", { value: "" }, left.length ? "Add …" : "no more"),
      ...left.map((name) => h("option", { value: name }, name)));
    this.rows.replaceChildren(...[...this.weights].map(([name, weight]) => this.row(name, weight)));
    this.element.hidden = !this.names.length && !this.weights.size;
  }

  row(name, weight) {
    const id = newId("weight");
    const value = typeof weight === "object" ? weight.unet : weight;
    const output = h("output", { htmlFor: id, "aria-live": "off" }, value.toFixed(2));
    const range = h("input", {
      id, type: "range", min: Math.min(-1, value), max: Math.max(2, value), step: 0.05, value,
      oninput: () => {
        this.weights.set(name, Number(range.value));
        output.textContent = Number(range.value).toFixed(2);
        this.changed();
      },
    });
    const remove = button("×", () => {
      this.weights.delete(name);
      this.show();
      this.changed();
    }, { "aria-label": `Remove ${name}`, class: "icon" });
    return h("div", { class: "slider" }, h("label", { htmlFor: id, title: name }, name), range, output, remove);
  }
}
