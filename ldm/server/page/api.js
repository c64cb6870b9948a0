// Requests to the server, with its key if it has one. The key stays in this tab's session.

import { h } from "./dom.js";

const KEY = "ldm-key";

// Whether this tab has a key.
export function hasKey() {
  return Boolean(sessionStorage.getItem(KEY));
}

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// --- JSON: seeds may be larger than the whole numbers that a double holds -----------------------------------------------

export function parse(text) {
  return JSON.parse(text, (_, value, context) =>
    Number.isInteger(value) && !Number.isSafeInteger(value) && context?.source ? BigInt(context.source) : value);
}

export function write(value) {
  return JSON.stringify(value, (_, part) =>
    typeof part === "bigint" ? (JSON.rawJSON ? JSON.rawJSON(String(part)) : Number(part)) : part);
}

// --- requests -----------------------------------------------------------------------------------------------------------

// The answer to a request. Raises ApiError with the server's own line if it refuses.
export async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : write(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server does not answer", 0);
  }
  if (answer.status === 401) {
    await newKey(key);
    return ask(path, { method, body, signal });
  }
  if (!answer.ok) {
    let message = `the server answered with ${answer.status}`;
    try {
      message = (await answer.json()).error.message;
    } catch {
      // a proxy's page, not the server's
    }
    throw new ApiError(message, answer.status);
  }
  return answer;
}

export async function json(path, options) {
  return parse(await (await ask(path, options)).text());
}

export async function blob(path, options) {
  return (await ask(path, options)).blob();
}

// The Server-Sent Events of a path, as [kind, data]; by fetch, since EventSource sends no key.
export async function* events(path, signal) {
  const reader = (await ask(path, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const messages = text.split("\n\n");
    text = messages.pop();
    for (const message of messages) {
      const found = /^event: (.*)\ndata: (.*)$/.exec(message);
      if (found) yield [found[1], parse(found[2])];
    }
  }
}

// --- the key ------------------------------------------------------------------------------------------------------------

let asking = null;

// A key from the user; all requests that need one wait for the same answer. `old` is the one that does not open.
function newKey(old) {
  if (sessionStorage.getItem(KEY) !== old) return undefined; // another request has asked meanwhile
  asking ??= askForKey(old).finally(() => {
    asking = null;
  });
  return asking;
}

function askForKey(old) {
  return new Promise((resolve) => {
    const input = h("input", { type: "password", id: "key", autocomplete: "off", required: true });
    const form = h("form", {
      method: "dialog",
      onsubmit: () => {
        sessionStorage.setItem(KEY, input.value.trim());
        dialog.remove();
        resolve();
      },
    },
      h("h2", {}, "This server needs a key"),
      old && h("p", { class: "problem", role: "alert" }, "The key does not fit."),
      h("label", { htmlFor: "key" }, "API key"), input,
      h("p", { class: "quiet" }, "It is kept until this tab is closed."),
      h("div", { class: "row end" }, h("button", { type: "submit", class: "main" }, "Open")));
    const dialog = h("dialog", { class: "small", "aria-label": "Key", oncancel: (event) => event.preventDefault() }, form);
    document.body.append(dialog);
    dialog.showModal();
  });
}
