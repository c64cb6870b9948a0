// Margins by which an image is extended: a field for each side, and the image on a canvas of their proportions.

import { h, newId } from "./dom.js";

const SIDES = ["Left", "Top", "Right", "Bottom"]; // in the order of the setting

export class Margins {
  // `schema` is that of the setting.
  constructor(schema, changed) {
    const { minimum: min, maximum: max } = schema.anyOf.find((one) => one.type === "array").items;
    this.fields = SIDES.map((side) => h("input", {
      id: newId(side.toLowerCase()), type: "number", min, max, step: 1, placeholder: "0", autocomplete: "off", inputMode: "numeric",
      oninput: () => {
        this.showCanvas();
        changed();
      },
    }));
    this.canvas = h("div", { class: "canvas" });
    this.element = h("fieldset", { class: "margins", title: schema.description },
      h("legend", {}, "Extend by pixels"),
      this.fields.map((field, place) => h("div", { class: "field" }, h("label", { htmlFor: field.id }, SIDES[place]), field)));
  }

  // The canvas with the surface of an image on it.
  around(surface, image) {
    this.surface = surface;
    this.image = image;
    this.canvas.replaceChildren(surface);
    this.showCanvas();
    return this.canvas;
  }

  showCanvas() {
    if (!this.image) return;
    const [left, top, right, bottom] = this.fields.map((field) => (field.validity.valid ? Number(field.value) : 0));
    const { naturalWidth: across, naturalHeight: down } = this.image;
    const [width, height] = [left + across + right, top + down + bottom];
    this.canvas.style.setProperty("--ratio", width / height);
    Object.assign(this.surface.style, {
      left: `${100 * left / width}%`, top: `${100 * top / height}%`, width: `${100 * across / width}%`,
    });
  }

  get some() {
    return this.fields.some((field) => Number(field.value) > 0);
  }

  // The value for a request; undefined if the image is not extended.
  get() {
    const wrong = this.fields.findIndex((field) => !field.validity.valid);
    if (wrong >= 0) throw new Error(`${SIDES[wrong]}: a whole number of pixels is needed`);
    return this.some ? this.fields.map((field) => Number(field.value)) : undefined;
  }

  // Show a value of the setting; undefined empties the fields.
  set(value) {
    this.fields.forEach((field, place) => { field.value = (Array.isArray(value) ? value[place] : value) || ""; });
    this.showCanvas();
  }
}
