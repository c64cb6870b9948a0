// Form fields from JSON Schema: a setting that is new in the server's schema has a field by itself.

import { button, dataUrl, fileButton, h, newId, takesDrops } from "./dom.js";

export class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

const words = (name) => {
  const text = name.replaceAll("_", " ");
  return text[0].toUpperCase() + text.slice(1);
};

const alternatives = (schema) => schema.anyOf ?? [schema];
export const isImage = (schema) => alternatives(schema).some((one) => one.contentEncoding === "base64");

// A field around controls: label, controls, help and one line for a problem.
class Field {
  constructor(name, schema, { label = words(name), help = schema.description ?? "" } = {}) {
    this.name = name;
    this.schema = schema;
    this.label = label;
    this.id = newId(name);
    this.problem = h("p", { class: "problem", id: `${this.id}-problem`, hidden: true });
    this.help = help;
    this.control = this.make();
    this.control.setAttribute("aria-describedby", `${this.id}-problem`);
    this.control.addEventListener("input", () => this.show(""));
    this.element = this.around();
  }

  around() {
    return h("div", { class: "field", title: this.help },
      h("label", { htmlFor: this.id }, this.label), this.control, this.problem);
  }

  show(text) {
    this.problem.textContent = text;
    this.problem.hidden = !text;
    this.control.toggleAttribute("aria-invalid", Boolean(text));
  }

  wrong(message) {
    return new FieldError(this, message);
  }

  // Show a value; undefined empties the field.
  set(value) {
    this.show("");
    this.control.value = value === undefined || value === null ? "" : this.written(value);
    this.control.dispatchEvent(new Event("change"));
  }

  written(value) {
    return Array.isArray(value) ? value.join(", ") : String(value);
  }

  // The value for a request; undefined if there is none.
  get() {
    const text = this.control.value.trim();
    return text === "" ? undefined : this.read(text);
  }

  placeholder(usual = this.schema.default) {
    return usual === undefined || usual === null ? "" : this.written(usual);
  }

  usual(value) {
    this.control.placeholder = this.placeholder(value);
  }
}

class TextField extends Field {
  make() {
    return h("input", { id: this.id, type: "text", placeholder: this.placeholder(), autocomplete: "off" });
  }

  read(text) {
    return text;
  }
}

export class LongTextField extends TextField {
  make() {
    return h("textarea", { id: this.id, rows: 2, placeholder: this.placeholder(), autocomplete: "off" });
  }
}

class NumberField extends Field {
  make() {
    const { type, minimum, exclusiveMinimum, maximum } = this.schema;
    return h("input", {
      id: this.id, type: "number", placeholder: this.placeholder(), autocomplete: "off", inputMode: "decimal",
      min: minimum ?? exclusiveMinimum, max: maximum, step: type === "integer" ? 1 : "any",
    });
  }

  get() {
    if (this.control.validity.badInput) throw this.wrong("a number is needed");
    return super.get();
  }

  read(text) {
    const { type, minimum, exclusiveMinimum, maximum } = this.schema;
    const value = Number(text);
    const least = minimum ?? exclusiveMinimum ?? -Infinity;
    if (type === "integer" && !Number.isInteger(value)) throw this.wrong("a whole number is needed");
    if (value < least || (exclusiveMinimum !== undefined && value <= least)) {
      throw this.wrong(exclusiveMinimum === undefined ? `at least ${least}` : `a number above ${least} is needed`);
    }
    if (value > (maximum ?? Infinity)) throw this.wrong(`at most ${maximum}`);
    return value;
  }
}

// Numbers with commas between them, or other texts that the schema allows.
class NumbersField extends TextField {
  read(text) {
    const parts = text.split(",").map((part) => Number(part));
    if (parts.some(Number.isNaN)) {
      if (alternatives(this.schema).some((one) => one.type === "string")) return text;
      throw this.wrong("numbers are needed, with commas between them");
    }
    const array = alternatives(this.schema).find((one) => one.type === "array");
    const single = alternatives(this.schema).some((one) => one.type === "number" || one.type === "integer");
    if (single && parts.length === 1) return parts[0];
    if (array?.minItems > parts.length) throw this.wrong(`${array.minItems} numbers are needed`);
    return parts;
  }
}

class ChoiceField extends Field {
  make() {
    const usual = this.schema.default;
    const names = this.schema.enum ?? this.schema.examples;
    return h("select", { id: this.id },
      h("option", { value: "" }, usual === undefined ? "default" : `default (${usual})`),
      names.map((name) => h("option", { value: name }, name)));
  }

  set(value) {
    const known = [...this.control.options].some((option) => option.value === value);
    if (value && !known) this.control.append(h("option", { value }, value));
    super.set(value);
  }

  read(text) {
    return text;
  }

  usual(value) {
    this.control.options[0].textContent = value ? `default (${value})` : "default";
  }
}

class SuggestedField extends NumbersField {
  make() {
    const list = newId("list");
    const input = super.make();
    input.setAttribute("list", list);
    this.suggestions = h("datalist", { id: list }, this.schema.examples.map((name) => h("option", { value: name })));
    return input;
  }

  around() {
    const found = super.around();
    found.append(this.suggestions);
    return found;
  }
}

class FlagField extends Field {
  make() {
    return h("input", { id: this.id, type: "checkbox", checked: this.schema.default ?? false });
  }

  around() {
    return h("div", { class: "field flag", title: this.help },
      this.control, h("label", { htmlFor: this.id }, this.label), this.problem);
  }

  set(value) {
    this.control.checked = value ?? this.schema.default ?? false;
  }

  read(text) {
    const value = { on: true, true: true, yes: true, off: false, false: false, no: false }[text.toLowerCase()];
    if (value === undefined) throw this.wrong("on or off is needed");
    return value;
  }

  get() {
    return this.control.checked === (this.schema.default ?? false) ? undefined : this.control.checked;
  }
}

class ImageField extends Field {
  make() {
    this.value = undefined;
    this.shown = h("img", { alt: "", hidden: true });
    const found = h("div", { class: "drop small", id: this.id, role: "group", "aria-label": this.label },
      this.shown, fileButton("Choose", (file) => this.take(file)),
      button("Remove", () => this.set(undefined)));
    takesDrops(found, (file) => this.take(file));
    return found;
  }

  async take(file) {
    this.set(await dataUrl(file));
  }

  set(value) {
    this.value = value;
    this.shown.hidden = !value;
    if (value) this.shown.src = value;
    this.show("");
  }

  get() {
    return this.value;
  }
}

// What no other field can show is written as JSON.
class JsonField extends TextField {
  written(value) {
    return JSON.stringify(value);
  }

  read(text) {
    try {
      return JSON.parse(text);
    } catch {
      throw this.wrong("JSON is needed");
    }
  }
}

// The field for a setting by its schema.
export function fieldFor(name, schema, more) {
  const kinds = alternatives(schema);
  const has = (type) => kinds.some((one) => one.type === type);
  const numbers = (one) => one.type === "array" && ["number", "integer"].includes(one.items?.type);
  let Kind = JsonField;
  if (isImage(schema)) Kind = ImageField;
  else if (schema.enum || (schema.type === "string" && schema.examples)) Kind = ChoiceField;
  else if (schema.examples) Kind = SuggestedField;
  else if (has("boolean")) Kind = FlagField;
  else if (schema.type === "number" || schema.type === "integer") Kind = NumberField;
  else if (kinds.some(numbers)) Kind = NumbersField;
  else if (has("string")) Kind = TextField;
  return new Kind(name, schema, more);
}
