// A chart of curves over steps, drawn as SVG: pointer or arrow keys read it, and its numbers are a table, too.

import { h, newId } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190;
const MARGIN = { left: 56, right: 12, top: 10, bottom: 24 };
const ROWS = 40; // of the table
const SERIES = 4; // colours

// An element of SVG with attributes and children.
function s(tag, attributes = {}, ...children) {
  const found = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  found.append(...children);
  return found;
}

export function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2);
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
}

function shortStep(step) {
  if (step >= 1e6) return `${Number((step / 1e6).toPrecision(3))}M`;
  return step >= 1e4 ? `${Number((step / 1e3).toPrecision(3))}k` : step.toLocaleString("en");
}

// About `count` round numbers between two, at even distances.
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const off = (factor) => Math.abs(Math.log((factor * power) / raw));
  const step = power * [1, 2, 5, 10].reduce((best, factor) => (off(factor) < off(best) ? factor : best));
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) found.push(n * step);
  return found;
}

// Powers of ten between two numbers, and their doubles and fives if there are few.
function logTicks(low, high) {
  for (const factors of [[1], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      found.push(...factors.map((factor) => factor * 10 ** power).filter((one) => one >= low && one <= high));
    }
    if (found.length >= 3) return found.filter((_, place) => place % Math.ceil(found.length / 6) === 0);
  }
  return ticks(low, high, 4);
}

// The range of the values, a little wider; of equal ones, some range around them.
function rangeOf(values, log) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (log) {
    const wider = (high / low) ** 0.04 || 1;
    return high > low ? [low / wider, high * wider] : [low / 2, high * 2];
  }
  if (high === low) {
    const some = Math.abs(high) / 10 || 1;
    return [low - some, high + some];
  }
  const wider = (high - low) * 0.04;
  low = low >= 0 && low - wider < 0 ? 0 : low - wider; // no negative numbers where there are none
  return [low, high + wider];
}

export class Chart {
  // `title` is its heading.
  constructor(title) {
    this.title = title;
    this.series = [];
    this.steps = []; // of all series
    this.log = false;
    const id = newId("chart");
    this.svg = s("svg", { class: "chart", role: "img", tabindex: 0, height: HEIGHT });
    this.output = h("output", { class: "read-out", id, "aria-live": "polite" });
    this.legend = h("p", { class: "legend" });
    this.table = h("details", { class: "numbers", ontoggle: () => this.fillTable() }, h("summary", {}, "Numbers"));
    this.element = h("figure", { class: "chart-box" },
      h("figcaption", {}, h("strong", {}, title), this.output), this.svg, h("div", { class: "row under" }, this.legend, this.table));
    this.svg.addEventListener("pointermove", (event) => this.read(this.stepAt(event.offsetX)));
    this.svg.addEventListener("pointerleave", () => this.read(undefined));
    this.svg.addEventListener("blur", () => this.read(undefined));
    this.svg.addEventListener("keydown", (event) => this.onKey(event));
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  // Show curves: [{name, points: [[step, value], …]}, …].
  set(series) {
    this.series = series.filter(({ points }) => points.length > 0).slice(0, SERIES);
    this.steps = [...new Set(this.series.flatMap(({ points }) => points.map(([step]) => step)))].sort((a, b) => a - b);
    this.legend.replaceChildren(...(this.series.length > 1 ? this.series.map(({ name }, place) =>
      h("span", { class: `key s${place}` }, name)) : []));
    this.svg.setAttribute("aria-label", this.told());
    this.draw();
    this.fillTable();
  }

  // What the curves show, in words.
  told() {
    return [this.title, ...this.series.map(({ name, points }) => {
      const values = points.map(([, value]) => value);
      const [first, last] = [points[0], points.at(-1)];
      return `${name}: ${short(first[1])} at step ${first[0]}, ${short(last[1])} at step ${last[0]}, `
        + `between ${short(Math.min(...values))} and ${short(Math.max(...values))}`;
    })].join(". ");
  }

  draw() {
    const width = Math.floor(this.element.clientWidth);
    if (!width || !this.series.length) return;
    const values = this.series.flatMap(({ points }) => points.map(([, value]) => value));
    const steps = this.series.flatMap(({ points }) => [points[0][0], points.at(-1)[0]]);
    const log = this.log && values.every((value) => value > 0);
    const [low, high] = rangeOf(values, log);
    let [first, last] = [Math.min(...steps), Math.max(...steps)];
    if (first === last) [first, last] = [Math.max(first - 1, 0), last + 1];
    const scale = log ? Math.log : (value) => value;
    const inner = { x: width - MARGIN.left - MARGIN.right, y: HEIGHT - MARGIN.top - MARGIN.bottom };
    this.x = (step) => MARGIN.left + (inner.x * (step - first)) / (last - first);
    this.y = (value) => MARGIN.top + inner.y * (1 - (scale(value) - scale(low)) / (scale(high) - scale(low)));
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("width", width);
    const end = HEIGHT - MARGIN.bottom;
    const rows = (log ? logTicks(low, high) : ticks(low, high, 4)).map((value) => s("g", {},
      s("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: this.y(value), y2: this.y(value) }),
      s("text", { x: MARGIN.left - 7, y: this.y(value) + 4, "text-anchor": "end" }, short(value))));
    const columns = ticks(first, last, Math.max(2, Math.floor(inner.x / 90))).filter(Number.isInteger).map((step) =>
      s("text", { x: this.x(step), y: end + 16, "text-anchor": this.x(step) > width - 30 ? "end" : "middle" }, shortStep(step)));
    const lines = this.series.map(({ points }, place) => {
      const drawn = points.map(([step, value]) => `${this.x(step).toFixed(1)},${this.y(value).toFixed(1)}`);
      const dots = points.length <= 60 ? points.map(([step, value]) => s("circle", { cx: this.x(step), cy: this.y(value), r: 2.2 })) : [];
      return s("g", { class: `curve s${place}` }, s("polyline", { points: drawn.join(" ") }), ...dots);
    });
    this.cross = s("g", { class: "cross" });
    this.svg.replaceChildren(...rows, ...columns, s("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: end, y2: end }), ...lines, this.cross);
    this.read(this.step);
  }

  // --- reading ----------------------------------------------------------------------------------------------------------

  // The step nearest to a place.
  stepAt(x) {
    if (!this.x) return undefined;
    return this.steps.reduce((best, step) => (Math.abs(this.x(step) - x) < Math.abs(this.x(best) - x) ? step : best));
  }

  onKey(event) {
    const steps = this.steps;
    const at = this.step === undefined ? steps.length : steps.indexOf(this.step);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - 10, PageDown: at + 10, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined || !steps.length) return;
    event.preventDefault();
    this.read(steps[Math.min(Math.max(to, 0), steps.length - 1)]);
  }

  // Show the figures at a step, or those of the end.
  read(step) {
    this.step = step;
    const lasts = this.series.map(({ points }) => points.at(-1)?.[0]).filter((one) => one !== undefined);
    if (!lasts.length || !this.cross) return;
    const at = step ?? Math.max(...lasts);
    const found = this.series.map(({ name, points }, place) => {
      const point = points.find(([own]) => own === at) ?? (step === undefined ? points.at(-1) : undefined);
      return point && { name, point, place };
    }).filter(Boolean);
    this.output.replaceChildren(`step ${at.toLocaleString("en")}: `,
      ...found.flatMap(({ name, point, place }) => [h("span", { class: this.series.length > 1 ? `key s${place}` : "" },
        this.series.length > 1 ? `${name} ${short(point[1])}` : short(point[1])), " "]));
    this.cross.replaceChildren(...(step === undefined ? [] : [
      s("line", { x1: this.x(at), x2: this.x(at), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
      ...found.map(({ point, place }) => s("circle", { class: `s${place}`, cx: this.x(at), cy: this.y(point[1]), r: 4 })),
    ]));
  }

  fillTable() {
    if (!this.table.open) return;
    const steps = this.steps;
    const stride = Math.ceil(steps.length / ROWS);
    const shown = steps.filter((_, place) => (steps.length - 1 - place) % stride === 0);
    const rows = shown.map((step) => h("tr", {}, h("th", { scope: "row" }, step.toLocaleString("en")), this.series.map(({ points }) => {
      const point = points.find(([own]) => own === step);
      return h("td", {}, point ? short(point[1]) : "");
    })));
    this.table.querySelector(".wide")?.remove();
    this.table.append(h("div", { class: "wide", tabIndex: 0, role: "group", "aria-label": `Numbers of ${this.title}` },
      h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "step"), this.series.map(({ name }) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, rows))));
  }
}
