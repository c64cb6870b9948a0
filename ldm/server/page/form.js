// The form of a job: the usual settings, adapters, images, and all other settings by the server's schema.

import { AdapterSliders } from "./adapters.js";
import { write } from "./api.js";
import { Control, ofControl } from "./control.js";
import { Problem, button, h, newId } from "./dom.js";
import { FieldError, LongTextField, fieldFor } from "./fields.js";
import { StartImage } from "./start_image.js";

const SAVED = "ldm-form";
export const USUAL = ["width", "height", "steps", "guidance", "scheduler", "n"];
const ELSEWHERE = ["prompt", "negative", "seed", "size", "image", "mask", "strength", "margins", "adapters", "control", "previews", "keep"];

const same = (one, other) => write(one) === write(other);

export class Form {
  constructor(app) {
    this.app = app;
    const { settings, about } = app;
    const save = () => this.save();
    this.prompt = new LongTextField("prompt", settings.prompt, { help: "" });
    this.negative = new LongTextField("negative", settings.negative, { label: "Negative prompt" });
    this.prompt.control.rows = 3;
    this.usual = USUAL.map((name) => fieldFor(name, settings[name], name === "n" ? { label: "Images" } : {}));
    this.seed = this.makeSeed(settings.seed);
    this.adapters = new AdapterSliders(app.adapters, save);
    this.start = new StartImage(settings, save);
    this.control = about.control.length ? new Control(about.control, settings) : undefined;
    this.others = Object.entries(settings).filter(([name]) => this.isOther(name)).map(([name, schema]) => fieldFor(name, schema));
    for (const [name, value] of Object.entries(about.defaults)) this.field(name)?.usual(value);
    for (const name of ["width", "height"]) this.field(name).control.step = about.multiple;
    this.problem = new Problem();
    this.notes = h("ul", { class: "notes", hidden: true });
    this.element = this.makeElement();
    this.element.addEventListener("input", save);
    this.element.addEventListener("change", save);
    this.restore();
  }

  isOther(name) {
    const { about } = this.app;
    if (USUAL.includes(name) || ELSEWHERE.includes(name)) return false;
    if (ofControl(name)) return false;
    if (name.startsWith("image_prompt")) return about.image_prompts;
    return about.refiner || !name.startsWith("refiner_");
  }

  // --- parts ----------------------------------------------------------------------------------------------------------

  makeSeed(schema) {
    const field = fieldFor("seed", { ...schema.anyOf[0], default: undefined });
    field.control.type = "text"; // all digits of a large seed
    field.control.inputMode = "numeric";
    field.control.placeholder = "random";
    field.read = (text) => {
      if (!/^\d{1,19}$/.test(text)) throw field.wrong("a whole number is needed");
      return Number.isSafeInteger(Number(text)) ? Number(text) : BigInt(text);
    };
    const random = button("Random", () => {
      field.set(undefined);
      this.save();
    });
    const fix = button("Fix", () => {
      field.set(this.lastSeed ?? Math.floor(Math.random() * 2 ** 32));
      this.save();
    }, { title: "Keep the last image's seed" });
    field.element.append(h("div", { class: "row joined" }, field.control, random, fix));
    field.element.append(field.problem);
    field.element.classList.add("seed");
    const mark = () => {
      random.setAttribute("aria-pressed", !field.control.value);
      fix.setAttribute("aria-pressed", Boolean(field.control.value));
    };
    field.control.addEventListener("input", mark);
    field.control.addEventListener("change", mark);
    mark();
    return field;
  }

  makeElement() {
    const [width, height, ...rest] = this.usual;
    const swap = button("⇄", () => {
      [width.control.value, height.control.value] = [height.control.value, width.control.value];
      [width.control.placeholder, height.control.placeholder] = [height.control.placeholder, width.control.placeholder];
      this.save();
    }, { "aria-label": "Swap width and height", title: "Swap width and height", class: "icon" });
    const sides = h("div", { class: "sides" }, width.element, swap, height.element);
    return h("div", { class: "fields" },
      this.prompt.element, this.negative.element,
      sides, h("div", { class: "grid" }, rest.map((field) => field.element)), this.seed.element,
      this.adapters.element, this.start.element, this.control?.element, this.makeOthers());
  }

  makeOthers() {
    const id = newId("filter");
    const none = h("p", { class: "quiet", hidden: true }, "No setting has these words.");
    const filter = h("input", {
      id, type: "search", placeholder: "Find a setting", "aria-label": "Find a setting",
      oninput: () => {
        const wanted = filter.value.trim().toLowerCase();
        for (const field of this.others) {
          field.element.hidden = !`${field.label} ${field.help}`.toLowerCase().includes(wanted);
        }
        none.hidden = this.others.some((field) => !field.element.hidden);
      },
    });
    this.folded = h("details", { class: "section", "data-name": "others" }, h("summary", {}, "All settings"),
      filter, none, h("div", { class: "grid" }, this.others.map((field) => field.element)),
      h("div", { class: "row end" }, button("Reset all", () => this.fill({}))));
    return this.folded;
  }

  get fields() {
    return [this.prompt, this.negative, this.seed, ...this.usual, ...this.others];
  }

  field(name) {
    return this.fields.find((field) => field.name === name);
  }

  // --- values ---------------------------------------------------------------------------------------------------------

  // The settings of a job, whose prompt may come from elsewhere. What is wrong is shown at its field, and undefined is
  // returned.
  values(prompted = false) {
    this.problem.show("");
    try {
      const found = this.texts();
      if (!found.prompt && !prompted) throw new FieldError(this.prompt, "a prompt is needed");
      return { ...found, ...this.imageValues() };
    } catch (error) {
      this.wrong(error);
      return undefined;
    }
  }

  texts() {
    const pairs = this.fields.map((field) => [field.name, field.get()]);
    return Object.fromEntries([...pairs, ["adapters", this.adapters.get()]].filter(([, value]) => value !== undefined));
  }

  imageValues() {
    try {
      return { ...this.start.values(), ...this.control?.values() };
    } catch (error) {
      if (error instanceof FieldError) throw error;
      this.start.problemOf(error.message);
      throw new FieldError(undefined, "");
    }
  }

  // Show a problem where it belongs: at the field that it names, or beside the button.
  wrong(error) {
    const field = error instanceof FieldError ? error.field : this.named(error.message);
    if (error instanceof FieldError && !field) return;
    if (!field) {
      this.problem.show(error.message);
      return;
    }
    if (this.others.includes(field)) this.folded.open = true;
    field.show(error.message);
    field.control.focus();
    field.control.scrollIntoView({ block: "nearest" });
  }

  // The field that a message of the server is about: "steps 500: …", "500 steps: …".
  named(message) {
    const [, first, second] = /^(\w+):? ?(\w+)?/.exec(message.replaceAll(",", "")) ?? [];
    return this.field(first) ?? (/^\d+$/.test(first) ? this.field(second) ?? (second === "images" ? this.field("n") : undefined) : undefined);
  }

  // Show settings in place of those that are there; `notes` say what of them is not used.
  fill(settings, notes = []) {
    const left = new Set(Object.keys(settings));
    for (const field of this.fields) {
      const value = settings[field.name];
      left.delete(field.name);
      field.set(value === undefined || same(value, field.schema.default) ? undefined : value);
    }
    this.adapters.set(settings.adapters);
    if (settings.strength !== undefined) this.start.setStrength(settings.strength);
    this.start.setMargins(settings.margins);
    for (const name of ["adapters", "strength", "margins"]) left.delete(name);
    const unknown = [...left].filter((name) => !same(settings[name], this.app.settings[name]?.default));
    this.tell([...notes, ...unknown.map((name) => `left out: ${name}, which this page has no field for`)]);
    this.save();
  }

  tell(notes) {
    this.notes.replaceChildren(...notes.map((note) => h("li", {}, note)));
    this.notes.hidden = !notes.length;
  }

  // --- kept while the tab is open -------------------------------------------------------------------------------------

  save() {
    const texts = Object.fromEntries(this.fields.filter((field) => field.control.value !== undefined && field.control.type !== "checkbox")
      .map((field) => [field.name, field.control.value]));
    const flags = Object.fromEntries(this.fields.filter((field) => field.control.type === "checkbox")
      .map((field) => [field.name, field.control.checked]));
    try {
      sessionStorage.setItem(SAVED, JSON.stringify({ texts, flags, adapters: this.adapters.get() }));
    } catch {
      // the session's room is full: the form is not kept
    }
  }

  restore() {
    const { texts = {}, flags = {}, adapters } = JSON.parse(sessionStorage.getItem(SAVED) ?? "{}");
    for (const [name, value] of Object.entries({ ...texts, ...flags })) {
      if (value !== "") this.field(name)?.set(value);
    }
    this.adapters.set(adapters);
  }
}
