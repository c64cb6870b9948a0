// Images with what can be done with them: cards, and a large view with all settings.

import { blob, json } from "./api.js";
import { Problem, button, dataUrl, h, saveFile } from "./dom.js";

export const VARIED = 0.4; // strength of "vary"
const TEXTS = ["prompt", "negative"]; // settings that the large view shows as texts
const FIRST = ["seed", "width", "height", "steps", "scheduler", "guidance"]; // that it always shows

// A finished image: its address at the server, and its settings once they are asked for.
export class GalleryImage {
  constructor(url, { settings, notes = [], file }) {
    this.url = url;
    this.known = settings && { settings, notes };
    this.file = file; // name of a download
  }

  async load() {
    this.data ??= await blob(this.url);
    this.shown ??= URL.createObjectURL(this.data);
    return this.shown;
  }

  async settings() {
    this.known ??= await json(`${this.url}/settings`);
    return this.known.settings;
  }

  async dataUrl() {
    await this.load();
    return dataUrl(this.data);
  }

  forget() {
    if (this.shown) URL.revokeObjectURL(this.shown);
  }
}

// The buttons of an image; `acts` has the functions of the page, `more` further buttons; `after()` is called once one of
// them but "Download" has acted. Narrow screens show the first.
function actions(image, acts, problem, more = [], after = () => {}) {
  const then = (act) => async () => {
    await act(image);
    after();
  };
  const download = async () => {
    await image.load();
    saveFile(image.data, image.file);
  };
  return h("div", { class: "actions", role: "group", "aria-label": "What to do with this image" },
    [
      ["Again", "The same settings with a new seed", then(acts.again)],
      ["Vary", "An image like this one", then(acts.vary)],
      ["As start", "Start from this image", then(acts.asStart)],
      ["Fix seed", "Use this seed from now on", then(acts.fixSeed)],
      ["Use settings", "Put all settings into the form", then(acts.use)],
      ["Download", "Save the file", download],
      ...more.map(([text, title, act]) => [text, title, then(act)]),
    ].map(([text, title, act], place) => button(text, () => problem.guard(act), { title, class: place > 2 ? "further" : "" })));
}

// A card of a finished image. A problem with it is shown on it.
export function card(image, acts, more) {
  const problem = new Problem();
  const view = viewOf(image, acts, more);
  const caption = h("figcaption", {}, h("span", { class: "seed" }));
  const found = h("figure", { class: "card" }, view, caption, problem.element, actions(image, acts, problem, more));
  fillCard(image, view, caption).catch((error) => {
    view.disabled = true;
    problem.show(error.message);
  });
  return found;
}

// A button with the image, which shows it large.
export function viewOf(image, acts, more) {
  const thumbnail = h("img", { alt: "", draggable: true, decoding: "async" });
  return h("button", { type: "button", class: "view", "aria-label": "Show large", onclick: () => show(image, acts, more) }, thumbnail);
}

async function fillCard(image, view, caption) {
  const thumbnail = view.firstChild;
  thumbnail.src = await image.load();
  const settings = await image.settings();
  thumbnail.alt = settings.prompt;
  view.setAttribute("aria-label", `Show large: ${settings.prompt}`);
  caption.replaceChildren(h("span", { class: "prompt", title: settings.prompt }, settings.prompt),
    h("span", { class: "seed" }, `seed ${settings.seed}`));
}

// --- the large view -----------------------------------------------------------------------------------------------------

function written(value) {
  if (value && typeof value === "object" && !Array.isArray(value)) {
    return Object.entries(value).map(([name, one]) => `${name} ${typeof one === "object" ? `${one.unet}, ${one.text}` : one}`).join(", ");
  }
  return Array.isArray(value) ? value.join(", ") : String(value);
}

const isUsual = (name, value, { schema }) => written(value) === written(schema[name]?.default ?? null);

async function show(image, acts, more) {
  const problem = new Problem();
  const settings = await image.settings();
  const changed = Object.keys(settings).filter((name) => ![...TEXTS, ...FIRST].includes(name) && !isUsual(name, settings[name], acts));
  const rows = [...FIRST, ...changed].filter((name) => name in settings).map((name) => [name, settings[name]]);
  const dialog = h("dialog", { class: "large", "aria-label": "Image", onclose: () => dialog.remove(), onclick: (event) => {
    if (event.target === dialog) dialog.close();
  } });
  dialog.append(h("div", { class: "split" },
    h("img", { src: await image.load(), alt: settings.prompt }),
    h("div", { class: "about" },
      h("div", { class: "row end" }, button("×", () => dialog.close(), { class: "icon", "aria-label": "Close" })),
      h("p", { class: "prompt" }, settings.prompt),
      settings.negative && h("p", { class: "quiet" }, `Without: ${settings.negative}`),
      actions(image, acts, problem, more, () => dialog.close()),
      problem.element,
      image.known.notes.length > 0 && h("ul", { class: "notes" }, image.known.notes.map((note) => h("li", {}, note))),
      h("dl", {}, rows.map(([name, value]) => [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, written(value))])))));
  document.body.append(dialog);
  dialog.showModal();
}
