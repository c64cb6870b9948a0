// Elements: made by a function, never from text with markup.

const SAVED_MS = 10_000; // until data that is saved as a file may be forgotten

// An element with properties (`class`, `onclick`, `aria-label` …) and children: elements, texts, or lists of them.
export function h(tag, properties = {}, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
    else if (name in found && name !== "list" && name !== "form") found[name] = value;
    else found.setAttribute(name, value === true ? "" : value);
  }
  found.append(...children.flat(2).filter((child) => child !== undefined && child !== null && child !== false));
  return found;
}

export function button(text, onclick, more = {}) {
  return h("button", { type: "button", onclick, ...more }, text);
}

let count = 0;
export function newId(prefix) {
  count += 1;
  return `${prefix}-${count}`;
}

// A line for one problem, which readers of the screen hear; it takes no room while there is none.
export class Problem {
  constructor() {
    this.element = h("p", { class: "problem", role: "alert", hidden: true, id: newId("problem") });
  }

  show(text) {
    this.element.textContent = text;
    this.element.hidden = !text;
  }

  // Do what a visitor asks for; what goes wrong is shown here.
  async guard(act) {
    this.show("");
    try {
      await act();
    } catch (error) {
      this.show(error.message);
    }
  }
}

// Let an element take dropped images, as `take(...files)`; what it takes is taken by nothing around it.
export function takesDrops(element, take) {
  element.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.stopPropagation();
    element.classList.add("over");
  });
  element.addEventListener("dragleave", () => element.classList.remove("over"));
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    element.classList.remove("over");
    const files = [...(event.dataTransfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (files.length) take(...files);
  });
}

// A button that opens the choice of an image file, or of several, for `take(...files)`.
export function fileButton(text, take, { multiple = false, ...more } = {}) {
  const input = h("input", {
    type: "file", accept: "image/png,image/jpeg,image/webp", multiple, class: "unseen", tabIndex: -1, "aria-hidden": "true",
    onchange: () => {
      const files = [...input.files];
      input.value = "";
      if (files.length) take(...files);
    },
  });
  return h("span", {}, button(text, () => input.click(), more), input);
}

// The line of an area that takes one image, while it has none.
export function dropLine(take) {
  return h("p", { class: "quiet" }, "Drop an image here, or ", fileButton("choose a file", take, { class: "link" }));
}

// Save data as a file of the visitor's.
export function saveFile(data, name) {
  const url = URL.createObjectURL(data);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), SAVED_MS);
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(blob);
  });
}
