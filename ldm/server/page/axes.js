// Axes of a grid: a setting of the form, words of its prompts, or an adapter's weight, with several values.

import { ofControl } from "./control.js";
import { Problem, h, newId } from "./dom.js";
import { fieldFor, isImage } from "./fields.js";
import { USUAL } from "./form.js";

const FIRST = ["prompt", "negative", "seed", "size", ...USUAL, "strength", "margins"]; // settings that come first in the list
const NONE = ["n", "batch", "image", "mask", "adapters", "priority", "seconds"]; // settings that no axis has
const TEXTS = ["prompt", "negative"]; // in which words are replaced
const words = (name) => name.replaceAll("_", " ");

// The values in "a, b"; one with commas stands in double quotes.
function listed(text) {
  const parts = [...`${text},`.matchAll(/\s*(?:"((?:[^"]|"")*)"\s*|([^,"\s][^,]*)?),/gy)];
  if (parts.reduce((length, [part]) => length + part.length, 0) <= text.length) {
    throw new Error('a value with commas stands in double quotes: "a fox, oil paint", a cat');
  }
  return parts.map(([, quoted, plain]) => quoted?.replaceAll('""', '"') ?? (plain ?? "").trim());
}

// --- what an axis can change --------------------------------------------------------------------------------------------

// A setting as an axis: `sets` are the keys of a job that it changes, `read` gives the value of a text, `put` a job's
// settings with it; `usual` are values to begin with.
function settingAxis(name, schema, form) {
  const field = name === "seed" ? form.seed : fieldFor(name, schema);
  const names = schema.enum ?? schema.examples ?? (schema.type === "boolean" ? ["off", "on"] : []);
  const isText = ["prompt", "negative", "prompt_2", "negative_2"].includes(name);
  return {
    name, title: words(name), sets: name === "size" ? ["size", "width", "height"] : [name], isText,
    help: [schema.description, names.length && `Known: ${names.join(", ")}.`].filter(Boolean).join(" "),
    usual: schema.type === "boolean" ? "off, on" : "",
    read: (text) => (name === "size" ? text : field.read(text)), // a side, or WIDTHxHEIGHT
    label: (text) => (name === "prompt" ? text : `${words(name)}${isText ? ":" : ""} ${text}`),
    put: ({ width, height, ...body }, value) => ({ ...body, ...(name === "size" ? {} : { width, height }), [name]: value }),
  };
}

function adapterAxis(name) {
  return {
    name: `adapter ${name}`, title: `weight of ${name}`, sets: [`adapter ${name}`], usual: "0, 0.5, 1",
    help: "Weight of the adapter; 0 is without it.",
    read: (text) => {
      if (!Number.isFinite(Number(text))) throw new Error("a number is needed");
      return Number(text);
    },
    label: (text) => `${name} ${text}`,
    put: (body, value) => ({ ...body, adapters: { ...body.adapters, [name]: value } }),
  };
}

const REPLACED = {
  name: "replace", title: "words of the prompt", sets: ["replace"], isText: true, usual: "",
  help: "The first value is replaced in the prompt by each: fox, cat, dog.",
  read: (text) => text,
  label: (text) => text,
  put: (body, value, first) => {
    const changed = TEXTS.filter((name) => first && body[name]?.includes(first));
    if (!changed.length) throw new Error(`the prompts do not have “${first}”, the first value`);
    return { ...body, ...Object.fromEntries(changed.map((name) => [name, body[name].replaceAll(first, value)])) };
  },
};

// All axes of a server's settings, in groups for a list.
function groupsOf({ about, settings, adapters, views: { generate: { form } } }) {
  const own = (name) => settingAxis(name, settings[name], form);
  const steers = (name) => about.control.length > 0 && ofControl(name);
  const others = Object.keys(settings).filter((name) =>
    (form.isOther(name) || steers(name)) && !NONE.includes(name) && !isImage(settings[name]));
  const first = FIRST.filter((name) => settings[name] && !NONE.includes(name));
  return [
    ["Often compared", [own(first[0]), REPLACED, ...first.slice(1).map(own)]],
    ["Adapters", adapters.map(adapterAxis)],
    ["All settings", others.map(own)],
  ].filter(([, axes]) => axes.length);
}

// --- the controls of one axis -------------------------------------------------------------------------------------------

export class AxisPicker {
  // `title` is "Columns" or "Rows".
  constructor(title, app) {
    const [id, values] = [newId("axis"), newId("values")];
    const groups = groupsOf(app);
    this.axes = groups.flatMap(([, axes]) => axes);
    this.problem = new Problem();
    this.help = h("p", { class: "quiet", id: newId("help") });
    this.choice = h("select", { id, onchange: () => this.chosen() },
      h("option", { value: "" }, "none"),
      groups.map(([label, axes]) => h("optgroup", { label }, axes.map((axis) => h("option", { value: axis.name }, axis.title)))));
    this.text = h("input", {
      id: values, type: "text", autocomplete: "off", oninput: () => this.show(""),
      "aria-describedby": `${this.help.id} ${this.problem.element.id}`,
    });
    this.element = h("div", { class: "axis" },
      h("div", { class: "field" }, h("label", { htmlFor: id }, title), this.choice),
      h("div", { class: "field" }, h("label", { htmlFor: values }, `Values of the ${title.toLowerCase()}`), this.text),
      this.help, this.problem.element);
    this.chosen();
  }

  get axis() {
    return this.axes.find((axis) => axis.name === this.choice.value);
  }

  chosen() {
    this.show("");
    this.text.disabled = !this.axis;
    this.text.placeholder = this.axis ? "with commas between them" : "";
    if (this.usual === this.text.value) this.text.value = this.axis?.usual ?? "";
    this.usual = this.axis?.usual || "";
    this.help.textContent = this.axis?.help ?? "";
  }

  show(text) {
    this.problem.show(text);
    this.text.toggleAttribute("aria-invalid", Boolean(text));
  }

  // The chosen values, each with its label and the settings that it gives a job; one that changes nothing if there is no
  // axis. What is wrong is shown here, and undefined returned.
  get() {
    const { axis } = this;
    if (!axis) return [{ label: "", put: (body) => body }];
    try {
      const texts = listed(this.text.value);
      if (!axis.isText && texts.includes("")) throw new Error(texts.length > 1 ? "a value is empty" : "values are needed");
      if (new Set(texts).size < texts.length) throw new Error("each value once");
      const values = texts.map((text) => axis.read(text));
      return texts.map((text, place) => ({ label: axis.label(text), put: (body) => axis.put(body, values[place], values[0]) }));
    } catch (error) {
      this.wrong(error.message);
      return undefined;
    }
  }

  wrong(message) {
    this.show(message);
    this.text.focus();
  }

  get state() {
    return { name: this.choice.value, text: this.text.value };
  }

  set state({ name, text }) {
    this.choice.value = name;
    this.chosen();
    this.text.value = text;
  }
}
