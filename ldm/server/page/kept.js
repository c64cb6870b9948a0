// The tab of the server's history: images that were kept, searched and paged.

import { ask, json } from "./api.js";
import { Problem, button, h } from "./dom.js";
import { GalleryImage, card } from "./gallery.js";

const WAIT_MS = 250; // after the last letter of a search
const COUNT = 24; // images of a page

class Kept {
  constructor(panel, app) {
    this.app = app;
    this.problem = new Problem();
    this.total = h("p", { class: "quiet", role: "status" });
    this.results = h("div", { class: "results" });
    this.words = h("input", {
      type: "search", id: "words", placeholder: "Words of a prompt, an adapter, or a seed",
      oninput: () => {
        clearTimeout(this.timer);
        this.timer = setTimeout(() => this.find(), WAIT_MS);
      },
    });
    this.further = button("Show more", () => this.more(), { hidden: true });
    panel.append(
      h("form", { class: "row search", role: "search", onsubmit: (event) => {
        event.preventDefault();
        this.find();
      } }, h("label", { htmlFor: "words" }, "Search"), this.words, this.total),
      this.problem.element, this.results, h("div", { class: "row middle" }, this.further));
  }

  shown() {
    return this.find();
  }

  // Show the latest images with the words of the search.
  async find() {
    this.images?.forEach((image) => image.forget());
    this.images = [];
    this.last = undefined;
    await this.more();
  }

  // Show further images; those of a new search in place of the others.
  async more() {
    const asked = (this.asked = {});
    const query = new URLSearchParams({ text: this.words.value, count: COUNT });
    const anew = this.last === undefined;
    if (!anew) query.set("before", this.last);
    try {
      const found = await json(`/v1/history?${query}`);
      if (asked !== this.asked) return; // a later search is on its way
      this.problem.show("");
      if (anew) this.results.replaceChildren();
      for (const one of found.images) this.add(one);
      this.last = found.images.at(-1)?.id;
      this.count = found.total;
      this.showTotal();
      this.further.hidden = this.results.childElementCount >= found.total;
    } catch (error) {
      this.problem.show(error.message);
    }
  }

  showTotal() {
    this.total.textContent = this.count === 1 ? "1 image" : `${this.count} images`;
  }

  add(one) {
    const image = new GalleryImage(one.url, { ...one, file: `${one.id}-${one.settings.seed}.png` });
    const remove = async () => {
      await ask(`/v1/history/${one.id}`, { method: "DELETE" });
      shown.remove();
      image.forget();
      this.count -= 1;
      this.showTotal();
      this.app.announce("The image is deleted.");
    };
    const shown = card(image, this.app.views.generate.acts, [["Delete", "Delete the image and its file", remove]]);
    this.images.push(image);
    this.results.append(shown);
  }
}

export const kept = {
  name: "history",
  title: "History",
  View: Kept,
  lacks: ({ history }) => !history && "This server keeps no history. Start it with: ldm serve --history FOLDER",
};
