// The form for an adapter of one's own images, and what can be done with a training and its adapter.

import { ask, blob, json } from "./api.js";
import { Problem, button, dataUrl, fileButton, h, newId, saveFile, takesDrops } from "./dom.js";

const MOST = 64; // images, as the server takes them
const LARGEST = 1_200_000; // pixels: more than any model is trained at, and so few that many images fit into a request
const AS_IT_IS = 400_000; // bytes of a file that is sent as it is
const QUALITY = 0.9;
const KINDS = { lora: "LoRA", "textual-inversion": "New word (textual inversion)" };

// An image file, made smaller if it is large, so that many fit into a request; as a data URL.
async function reduced(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(Math.sqrt(LARGEST / (bitmap.width * bitmap.height)), 1);
  if (scale === 1 && file.size <= AS_IT_IS) return dataUrl(file);
  const canvas = h("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", QUALITY);
}

export class TrainForm {
  // `begun(id)` is called with the run that begins.
  constructor(begun) {
    this.begun = begun;
    this.images = []; // {url, caption: input, element}
    this.problem = new Problem();
    this.list = h("ul", { class: "thumbs", "aria-label": "Images" });
    this.count = h("p", { class: "quiet", role: "status" });
    this.area = h("div", { class: "drop" }, h("p", { class: "quiet" }, "Drop images here, or ",
      fileButton("choose files", (...files) => this.take(files), { multiple: true, class: "link" })));
    takesDrops(this.area, (...files) => this.take(files));
    this.kind = h("select", { id: newId("kind"), onchange: () => this.showKind() },
      Object.entries(KINDS).map(([value, text]) => h("option", { value }, text)));
    this.trigger = h("input", { id: newId("trigger"), maxLength: 200, placeholder: "sks dog" });
    this.ofClass = h("input", { id: newId("class"), maxLength: 200, placeholder: "a dog" });
    this.steps = h("input", { id: newId("steps"), type: "number", min: 1, max: 20_000, placeholder: "as suits the images" });
    this.rank = h("input", { id: newId("rank"), type: "number", min: 1, max: 256, placeholder: "as suits the model" });
    this.onlyLora = [this.ofClass, this.rank];
    this.send = h("button", { type: "submit", class: "main" }, "Start to train");
    this.element = h("form", { class: "run train-form", onsubmit: (event) => {
      event.preventDefault();
      this.submit();
    } },
      h("h2", {}, "New adapter"), this.area, this.list, this.count,
      h("div", { class: "grid" },
        this.field("Kind", this.kind), this.field("Trigger", this.trigger, "Words that call what is learned; they begin each caption."),
        this.field("Class prompt", this.ofClass, "What it is without the trigger: images of it keep the model from forgetting."),
        this.field("Steps", this.steps), this.field("Rank", this.rank)),
      this.problem.element, h("div", { class: "row" }, this.send,
        h("span", { class: "quiet" }, "The server trains one adapter at a time; images take longer meanwhile.")));
    this.showKind();
    this.showCount();
  }

  field(title, input, hint) {
    const id = newId("hint");
    if (hint) input.setAttribute("aria-describedby", id);
    return h("div", { class: "field" }, h("label", { htmlFor: input.id }, title), input, hint && h("small", { class: "quiet", id }, hint));
  }

  showKind() {
    for (const input of this.onlyLora) input.closest(".field").hidden = this.kind.value !== "lora";
  }

  showCount() {
    this.count.textContent = this.images.length ? `${this.images.length} of at most ${MOST} images. Captions may be left out if there is a trigger.`
      : `10 to ${MOST} images of the same thing, or in the same style.`;
  }

  async take(files) {
    this.problem.show(this.images.length + files.length > MOST ? `at most ${MOST} images are taken` : "");
    for (const file of files.slice(0, MOST - this.images.length)) {
      try {
        this.add(file.name, await reduced(file));
      } catch {
        this.problem.show(`${file.name} is no image that this browser reads`);
      }
    }
    this.showCount();
  }

  add(name, url) {
    const caption = h("input", { placeholder: "caption", maxLength: 2000, "aria-label": `Caption of ${name}` });
    const image = { url, caption };
    image.element = h("li", {}, h("img", { src: url, alt: name }), caption, button("×", () => {
      this.images.splice(this.images.indexOf(image), 1);
      image.element.remove();
      this.showCount();
      this.send.focus();
    }, { class: "icon", "aria-label": `Remove ${name}` }));
    this.images.push(image);
    this.list.append(image.element);
  }

  async submit() {
    if (!this.images.length) {
      this.problem.show("there are no images yet");
      return;
    }
    const lora = this.kind.value === "lora";
    const number = (input) => (input.value === "" ? undefined : Number(input.value));
    this.send.disabled = true;
    try {
      const { id } = await json("/v1/runs", { method: "POST", body: {
        kind: this.kind.value, trigger: this.trigger.value.trim(), steps: number(this.steps),
        class_prompt: lora ? this.ofClass.value.trim() : undefined, rank: lora ? number(this.rank) : undefined,
        images: this.images.map(({ url, caption }) => ({ image: url, caption: caption.value.trim() })),
      } });
      this.problem.show("");
      await this.begun(id);
    } catch (error) {
      this.problem.show(error.message);
    } finally {
      this.send.disabled = false;
    }
  }
}

// What the program of a training says, a button to stop it, and its adapter.
export class Training {
  // `address` is that of the run; `keeps`: whether the server can keep adapters; `look()` asks for the state anew.
  constructor(address, keeps, look) {
    this.address = address;
    this.problem = new Problem();
    this.said = h("pre", { class: "said", tabIndex: 0, "aria-label": "What the program said last" });
    this.stop = button("Stop", async () => {
      await this.problem.guard(() => ask(`${address}/stop`, { method: "POST" }));
      this.stop.textContent = "Stop at once";
      look();
    }, { title: "It saves a checkpoint first" });
    this.stopping = h("div", { class: "row" }, this.stop);
    this.name = h("input", { id: newId("name"), maxLength: 64, placeholder: "name" });
    this.kept = h("span", { class: "quiet", role: "status" });
    this.adapter = h("div", { class: "row" }, button("Download the adapter", () => this.problem.guard(() => this.download())),
      keeps && [h("label", { htmlFor: this.name.id, class: "unseen" }, "Name of the adapter"), this.name,
        button("Add to the server's adapters", () => this.problem.guard(() => this.keep()))], this.kept);
    this.output = h("details", { class: "section" }, h("summary", {}, "What the program said"), this.said);
    this.element = h("div", { class: "training", hidden: true }, this.stopping, this.adapter, this.problem.element, this.output);
  }

  set({ said, stops, adapter, state, stages }) {
    this.element.hidden = !stops && !adapter && !said.length;
    this.stopping.hidden = !stops;
    this.adapter.hidden = !adapter;
    this.output.hidden = !said.length;
    if (said.length && this.said.textContent !== said.join("\n")) {
      this.said.textContent = said.join("\n");
      this.said.scrollTop = this.said.scrollHeight;
    }
    if (said.length && (state === "failed" || !stages.length)) this.output.open = true;
  }

  async download() {
    saveFile(await blob(`${this.address}/adapter`), `${this.name.value.trim() || "adapter"}.safetensors`);
  }

  async keep() {
    const { name } = await json(`${this.address}/keep`, { method: "POST", body: { name: this.name.value.trim() } });
    this.kept.textContent = `Prompts can name it: <lora:${name}:1>. The list of adapters has it once the page is loaded again.`;
  }
}
