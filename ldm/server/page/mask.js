// A mask painted on an image: strokes of a brush or an eraser, of which the last can be undone.

import { button, h, newId } from "./dom.js";

const GROWTH = 1.25;

// An image and what lies on it, as large as the form allows.
export function surfaceOf(image, ...above) {
  const found = h("div", { class: "surface" }, image, above);
  found.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  return found;
}

export class MaskPainter {
  // `image` is an <img> that is shown; the mask has its pixels.
  constructor(image, changed) {
    this.image = image;
    this.changed = changed;
    this.strokes = [];
    this.erasing = false;
    this.canvas = h("canvas", {
      class: "mask", tabIndex: 0, width: image.naturalWidth, height: image.naturalHeight,
      "aria-label": "Mask: paint what is made anew. [ and ] change the brush, E erases, Ctrl+Z undoes, Delete clears.",
    });
    this.cursor = h("div", { class: "brush", hidden: true });
    this.surface = surfaceOf(image, this.canvas, this.cursor);
    this.tools = this.makeTools();
    this.listen();
  }

  makeTools() {
    const id = newId("brush");
    const side = Math.min(this.canvas.width, this.canvas.height);
    const [min, max, value] = [side / 50, side / 2, side / 8].map(Math.ceil);
    this.size = h("input", { id, type: "range", min, max, value, oninput: () => this.showSize() });
    this.paints = button("Brush", () => this.erase(false), { "aria-pressed": "true" });
    this.erases = button("Eraser", () => this.erase(true), { "aria-pressed": "false", title: "E" });
    return h("div", { class: "tools", role: "toolbar", "aria-label": "Mask" },
      this.paints, this.erases,
      h("label", { htmlFor: id, title: "[ and ]" }, "Size"), this.size,
      button("Undo", () => this.undo(), { title: "Ctrl+Z" }), button("Clear", () => this.clear(), { title: "Delete" }));
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.strokes.push({ size: Number(this.size.value), erasing: this.erasing, points: [this.place(event)] });
      this.stroke = this.strokes.at(-1);
      this.draw(this.stroke);
    });
    canvas.addEventListener("pointermove", (event) => {
      this.showCursor(event);
      if (!this.stroke) return;
      for (const one of event.getCoalescedEvents?.() ?? [event]) this.stroke.points.push(this.place(one));
      this.draw(this.stroke);
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, () => {
        if (this.stroke) this.changed();
        this.stroke = undefined;
      });
    }
    canvas.addEventListener("pointerleave", () => { this.cursor.hidden = true; });
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const undo = event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey);
    const act = undo ? () => this.undo() : {
      "[": () => this.resize(1 / GROWTH), "]": () => this.resize(GROWTH), e: () => this.erase(!this.erasing),
      Delete: () => this.clear(),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  resize(factor) {
    this.size.value = Math.round(Number(this.size.value) * factor + (factor > 1 ? 1 : -1));
    this.showSize();
  }

  erase(erasing) {
    this.erasing = erasing;
    this.paints.setAttribute("aria-pressed", !erasing);
    this.erases.setAttribute("aria-pressed", erasing);
  }

  // The place of a pointer in pixels of the image.
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * this.canvas.width / box.width, (event.clientY - box.top) * this.canvas.height / box.height];
  }

  showSize() {
    const across = Number(this.size.value) * this.canvas.getBoundingClientRect().width / this.canvas.width;
    this.cursor.style.width = this.cursor.style.height = `${across}px`;
  }

  showCursor(event) {
    const box = this.canvas.getBoundingClientRect();
    this.cursor.hidden = event.pointerType === "touch";
    this.cursor.style.left = `${event.clientX - box.left}px`;
    this.cursor.style.top = `${event.clientY - box.top}px`;
    this.showSize();
  }

  draw({ size, erasing, points }) {
    const context = this.canvas.getContext("2d");
    context.globalCompositeOperation = erasing ? "destination-out" : "source-over";
    context.strokeStyle = context.fillStyle = "#14b8a6";
    context.lineWidth = size;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...points[0]);
    const [[x, y], ...rest] = points;
    for (const point of rest.length ? rest : [[x + 0.01, y]]) context.lineTo(...point); // a line without length is not drawn
    context.stroke();
  }

  redraw() {
    this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.strokes.forEach((stroke) => this.draw(stroke));
    this.changed();
  }

  undo() {
    this.strokes.pop();
    this.redraw();
  }

  clear() {
    this.strokes = [];
    this.redraw();
  }

  get empty() {
    return !this.strokes.some((stroke) => !stroke.erasing);
  }

  // The mask as a data URL: white where it is painted.
  url() {
    const found = h("canvas", { width: this.canvas.width, height: this.canvas.height });
    const context = found.getContext("2d");
    context.drawImage(this.canvas, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "white";
    context.fillRect(0, 0, found.width, found.height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "black";
    context.fillRect(0, 0, found.width, found.height);
    return found.toDataURL("image/png");
  }
}
