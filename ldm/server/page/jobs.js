// Jobs of this tab: submitted, followed by their events, and found again after the page was reloaded.

import { events, json, parse, write } from "./api.js";

const AGAIN_MS = 1500; // until a stream that broke is asked for again
const KEPT = 100; // jobs that are remembered

export const isOver = (state) => ["done", "failed", "cancelled"].includes(state.state);

export class Jobs {
  // `saved` is their place in the session; `streams` are followed at a time: browsers open six connections to a host, and
  // others must find room. `show(job)` is called when a job is new, `changed(job)` after each event.
  constructor(saved, streams, show, changed) {
    this.saved = saved;
    this.streams = streams;
    this.show = show;
    this.changed = changed;
    this.all = [];
    this.open = 0;
    this.queue = [];
  }

  // Submit a job, the image of a cell if it is of a grid. Raises ApiError if the server does not take it.
  async submit(body, cell) {
    const state = await json("/v1/jobs", { method: "POST", body });
    return this.add({ id: state.id, body, state, cell });
  }

  add(job) {
    job.previews = [];
    job.steps = new Map(); // number of an image -> [step, steps]
    this.all.push(job);
    this.save();
    this.show(job);
    this.queue.push(job);
    this.next();
    return job;
  }

  // The first job that is not over, and so the one that runs.
  get current() {
    return this.all.find((job) => !isOver(job.state));
  }

  async cancel(job) {
    job.state = await json(`/v1/jobs/${job.id}`, { method: "DELETE" });
    this.changed(job);
  }

  // Follow as many jobs as may be followed at a time.
  next() {
    while (this.open < this.streams && this.queue.length) {
      const job = this.queue.shift();
      this.open += 1;
      this.follow(job).finally(() => {
        this.open -= 1;
        this.next();
      });
    }
  }

  async follow(job) {
    while (!isOver(job.state)) {
      try {
        for await (const [kind, data] of events(`/v1/jobs/${job.id}/events`)) this.take(job, kind, data);
        if (!isOver(job.state)) throw new Error("the stream has ended");
      } catch (error) {
        if (error.status === 404) {
          job.state = { ...job.state, state: "failed", error: "the server does not know this job any more" };
          break;
        }
        job.lost = true;
        this.changed(job);
        await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
      }
    }
    this.changed(job);
    this.save();
  }

  take(job, kind, data) {
    job.lost = false;
    if (kind === "step") {
      for (const [place, number] of data.images.entries()) {
        job.steps.set(number, [data.step, data.steps]);
        if (data.previews) job.previews[number] = data.previews[place];
      }
    } else {
      job.state = data;
    }
    this.changed(job);
  }

  // --- kept while the tab is open -------------------------------------------------------------------------------------

  save() {
    const kept = this.all.filter((job) => !["failed", "cancelled"].includes(job.state.state)).slice(-KEPT);
    const saved = kept.map(({ id, body, cell }) => ({ id, body: withoutImages(body), cell }));
    sessionStorage.setItem(this.saved, write(saved));
  }

  // Find the jobs that the server still has.
  async restore() {
    const saved = parse(sessionStorage.getItem(this.saved) ?? "[]");
    const answers = await Promise.all(saved.map(({ id }) => json(`/v1/jobs/${id}`).catch(() => undefined)));
    for (const [place, state] of answers.entries()) {
      if (state) this.add({ ...saved[place], state, restored: true });
    }
    this.save();
  }
}

// A job's settings without its images, which are too large to be kept.
function withoutImages(body) {
  const { image, mask, control, image_prompt, image_prompt_mask, ...rest } = body;
  const lost = Boolean(image || control || image_prompt);
  return lost ? { ...rest, lost } : rest;
}
