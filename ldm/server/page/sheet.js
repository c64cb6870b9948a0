// A sheet: the images of a grid with their labels, drawn into one.

import { h } from "./dom.js";

const GAP = 4; // pixels between cells
const LINES = 4; // of a column's label
const LONGEST = 16_000; // pixels of a side that browsers draw
const MOST = 100e6; // pixels of a sheet that `ldm` reads

// A canvas with images by number, row after row, at least one; the place of one that is missing is gray. Without labels of
// rows there is one row.
export function sheet(images, columns, rows) {
  const found = [...images.values()];
  const natural = [Math.max(...found.map((one) => one.naturalWidth)), Math.max(...found.map((one) => one.naturalHeight))];
  const down = Math.max(rows.length, 1);
  const most = Math.min(1, LONGEST / (natural[0] * (columns.length + 1)), LONGEST / (natural[1] * (down + 1)),
    Math.sqrt(MOST / (natural[0] * natural[1] * (columns.length + 1) * (down + 1))));
  const font = Math.min(Math.max(Math.round(natural[0] * most / 24), 12), 36);
  const [width, height] = [Math.max(Math.floor(natural[0] * most), 8 * font), Math.floor(natural[1] * most)];
  const line = Math.round(font * 1.25);
  const canvas = h("canvas");
  const context = canvas.getContext("2d");
  const face = `${font}px system-ui, sans-serif`;
  context.font = face;
  const above = columns.map((label) => wrapped(context, label, width, LINES));
  const left = rows.map((label) => wrapped(context, label, Math.max(width, 16 * font), Math.max(Math.floor(height / line), 1)));
  const margin = rows.length && Math.ceil(Math.max(...left.flat().map((text) => context.measureText(text).width))) + 2 * GAP;
  const top = Math.max(...above.map((texts) => texts.length)) * line + 2 * GAP;
  canvas.width = margin + columns.length * (width + GAP) - GAP;
  canvas.height = top + down * (height + GAP) - GAP;
  const at = (column, row) => [margin + column * (width + GAP), top + row * (height + GAP)];
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  Object.assign(context, { fillStyle: "black", font: face, textAlign: "center", textBaseline: "middle" });
  for (const [column, texts] of above.entries()) write(context, texts, line, at(column, 0)[0] + width / 2, top / 2);
  for (const [row, texts] of left.entries()) write(context, texts, line, margin / 2, at(0, row)[1] + height / 2);
  for (let number = 0; number < columns.length * down; number += 1) {
    const [x, y] = at(number % columns.length, Math.floor(number / columns.length));
    const image = images.get(number);
    if (image) {
      const [across, high] = [image.naturalWidth * most, image.naturalHeight * most].map(Math.floor);
      context.drawImage(image, Math.round(x + (width - across) / 2), Math.round(y + (height - high) / 2), across, high);
    } else {
      context.fillStyle = "lightgray";
      context.fillRect(x, y, width, height);
    }
  }
  return canvas;
}

// A canvas as a PNG file.
export function png(canvas) {
  return new Promise((resolve, reject) => {
    canvas.toBlob((data) => (data ? resolve(data) : reject(new Error("this browser cannot draw so large a sheet"))), "image/png");
  });
}

function write(context, texts, line, x, y) {
  for (const [number, text] of texts.entries()) context.fillText(text, x, y + (number - (texts.length - 1) / 2) * line);
}

// The lines of a label of at most so many pixels; what does not fit ends in "…".
function wrapped(context, label, width, lines) {
  const fits = (text) => context.measureText(text).width <= width;
  const found = [];
  let rest = label.trim();
  while (rest && found.length < lines) {
    let end = rest.length;
    while (end > 1 && !fits(rest.slice(0, end))) end -= 1;
    if (end < rest.length && found.length === lines - 1) {
      while (end > 1 && !fits(`${rest.slice(0, end)}…`)) end -= 1;
      return [...found, `${rest.slice(0, end)}…`];
    }
    const space = rest.lastIndexOf(" ", end);
    if (end < rest.length && space > 0) end = space;
    found.push(rest.slice(0, end).trim());
    rest = rest.slice(end).trim();
  }
  return found.length ? found : [""];
}
