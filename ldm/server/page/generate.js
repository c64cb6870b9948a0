// The tab that makes images: a form, the jobs on their way, and their images.

import { json } from "./api.js";
import { button, dataUrl, fileButton, h, takesDrops } from "./dom.js";
import { Form } from "./form.js";
import { GalleryImage, VARIED, card } from "./gallery.js";
import { Jobs, isOver } from "./jobs.js";
import { Place } from "./place.js";

const NARROW = "(max-width: 820px)"; // where images stand below the form

class Generate {
  constructor(panel, app) {
    this.app = app;
    this.form = new Form(app);
    this.results = h("div", { class: "results" });
    this.empty = h("p", { class: "quiet hint" }, "Images appear here. Ctrl+Enter makes one, Escape cancels.");
    this.cards = new Map(); // job -> the places of its images
    this.jobs = new Jobs("ldm-jobs", 3, (job) => this.showJob(job), (job) => this.changed(job));
    this.acts = {
      schema: app.settings,
      again: (image) => this.again(image),
      vary: (image) => this.vary(image),
      asStart: (image) => this.asStart(image),
      fixSeed: (image) => this.fixSeed(image),
      use: (image) => this.use(image),
    };
    panel.append(this.makeForm(), h("div", { class: "made" }, this.empty, this.results));
    takesDrops(document.body, (file) => this.readBack(file));
    this.jobs.restore();
  }

  makeForm() {
    const { about } = this.app;
    const keep = h("input", { type: "checkbox", id: "keep", checked: true });
    this.keep = about.history ? keep : undefined;
    this.make = h("button", { type: "submit", class: "main", title: "Ctrl+Enter" }, "Make images");
    this.cancelling = button("Cancel", () => this.cancel(), { title: "Escape", hidden: true });
    return h("form", {
      class: "form", "aria-label": "Settings", noValidate: true,
      onsubmit: (event) => {
        event.preventDefault();
        this.begin();
      },
    },
      h("div", { class: "row read" }, fileButton("Read settings from an image", (file) => this.readBack(file), {
        class: "link", title: "Or drop a PNG anywhere on the page: ours, or AUTOMATIC1111's",
      })),
      this.form.notes, this.form.element,
      h("div", { class: "foot" }, this.form.problem.element,
        h("div", { class: "row" }, this.make, this.cancelling,
          this.keep && h("span", { class: "flag" }, keep, h("label", { htmlFor: "keep" }, "Keep in history")))));
  }

  // --- jobs -----------------------------------------------------------------------------------------------------------

  begin() {
    return this.submit(this.form.values());
  }

  // Settings as the request of a job.
  request(settings) {
    return { ...settings, previews: true, ...(this.keep?.checked ? { keep: true } : {}) };
  }

  // Submit settings as a job; what is wrong with them is shown at the form.
  async submit(settings) {
    if (!settings) return;
    try {
      await this.jobs.submit(this.request(settings));
      this.form.tell([]);
    } catch (error) {
      this.form.wrong(error);
    }
  }

  async cancel(job = this.jobs.current) {
    if (!job) return;
    try {
      await this.jobs.cancel(job);
    } catch (error) {
      this.form.problem.show(error.message);
    }
  }

  showJob(job) {
    const places = job.state.images.map((_, number) => new Place(job, number, () => this.cancel(job)));
    this.cards.set(job, places);
    this.results.prepend(...places.map((place) => place.element));
    if (!job.restored && matchMedia(NARROW).matches) this.results.scrollIntoView();
    this.changed(job);
  }

  changed(job) {
    const { state } = job;
    for (const [number, place] of this.cards.get(job).entries()) {
      const made = state.images[number];
      if (made && !place.image) this.finish(job, place, made);
      else if (!made) place.update();
    }
    this.say(job);
    if (isOver(state) && state.notes.length) this.form.tell(state.notes);
    this.empty.hidden = this.results.childElementCount > 0;
    this.cancelling.hidden = !this.jobs.current;
    const waiting = this.jobs.all.filter((one) => !isOver(one.state)).length;
    document.title = waiting ? `(${waiting}) ldm` : "ldm";
  }

  finish(job, place, made) {
    const image = new GalleryImage(made.url, { file: `${made.seed}.png` });
    image.body = job.body;
    place.image = image;
    const shown = card(image, this.acts);
    place.element.replaceWith(shown);
    place.element = shown;
    this.form.lastSeed = made.seed;
  }

  // Say how far a job is: at its beginning, at each quarter of its steps, and at its end.
  say(job) {
    const [step, steps] = [...job.steps.values()].at(-1) ?? [0, 1];
    const quarter = Math.floor(4 * step / steps);
    const now = isOver(job.state) ? job.state.state : `${job.state.state} ${quarter}`;
    if (now === job.said || job.restored) return;
    job.said = now;
    const texts = {
      done: "The image is done.", failed: `The image has failed: ${job.state.error}`, cancelled: "Cancelled.",
      waiting: "The image waits.", running: `Step ${step} of ${steps}.`,
    };
    this.app.announce(texts[job.state.state]);
  }

  // --- what is done with images ---------------------------------------------------------------------------------------

  async again(image) {
    const { seed, n, lost, previews, keep, ...body } = image.body ?? (await image.settings());
    if (lost) throw new Error("the image that it was made from is not kept; put it into the form again");
    this.app.open("generate");
    await this.submit(body);
  }

  async vary(image) {
    const { seed, n, width, height, hires, hires_strength, hires_latents, margins, ...settings } = await image.settings();
    this.app.open("generate");
    await this.submit({ ...settings, image: await image.dataUrl(), strength: Math.max(VARIED, 1 / settings.steps) });
  }

  async asStart(image) {
    this.app.open("generate");
    this.form.start.setMargins(undefined);
    await this.form.start.show(await image.dataUrl());
    this.form.start.element.scrollIntoView({ block: "nearest" });
    this.form.start.element.querySelector("summary").focus();
  }

  async fixSeed(image) {
    const { seed } = await image.settings();
    this.app.open("generate");
    this.form.seed.set(seed);
    this.form.save();
  }

  async use(image) {
    const settings = await image.settings();
    this.app.open("generate");
    this.form.fill(settings, image.known.notes);
    this.form.prompt.control.focus();
  }

  // Read the settings of an image file into the form.
  async readBack(file) {
    this.app.open("generate");
    this.form.problem.show("");
    try {
      const found = await json("/v1/info", { method: "POST", body: { image: await dataUrl(file) } });
      this.form.fill(found.settings, found.notes);
      this.app.announce("The settings are in the form.");
    } catch (error) {
      this.form.problem.show(`${file.name}: ${error.message}`);
    }
  }
}

export const generate = {
  name: "generate",
  title: "Generate",
  View: Generate,
};
