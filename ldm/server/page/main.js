// The page: asks the server what it has, and shows the tabs.

import { json } from "./api.js";
import { Problem, button, h } from "./dom.js";
import { TABS } from "./tabs.js";

const said = document.getElementById("said");

// Say something to readers of the screen.
function announce(text) {
  said.textContent = text;
}

function open(name, app) {
  app.view = app.views[name];
  for (const tab of TABS) {
    const chosen = tab.name === name;
    const head = document.getElementById(`tab-${tab.name}`);
    head.setAttribute("aria-selected", chosen);
    head.tabIndex = chosen ? 0 : -1;
    document.getElementById(`panel-${tab.name}`).hidden = !chosen;
  }
  app.view?.shown?.();
  if (location.hash.slice(1) !== name) history.replaceState(null, "", `#${name}`);
}

// Ctrl+Enter begins what the open tab makes, and Escape cancels it.
function onKey(event, view) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && view?.begin) {
    event.preventDefault();
    view.begin();
  } else if (event.key === "Escape" && event.target.type !== "search" && !document.querySelector("dialog[open]")) {
    view?.cancel?.();
  }
}

// The arrow keys go from one tab to the next.
function onArrow(event, app) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const at = TABS.findIndex((tab) => `tab-${tab.name}` === event.target.id);
  if (!step || at < 0) return;
  const next = TABS[(at + step + TABS.length) % TABS.length];
  open(next.name, app);
  document.getElementById(`tab-${next.name}`).focus();
}

async function start() {
  const heads = document.getElementById("tabs");
  const panels = document.getElementById("panels");
  const problem = new Problem();
  panels.append(problem.element);
  try {
    const [about, schema, adapters] = await Promise.all(["/v1/about", "/v1/settings", "/v1/adapters"].map((path) => json(path)));
    const app = { about, settings: schema.properties, adapters, announce, views: {}, open: (name) => open(name, app) };
    document.getElementById("model").textContent = [...new Set([about.model, about.family])].join(" · ");
    for (const tab of TABS) {
      heads.append(button(tab.title, () => open(tab.name, app), {
        id: `tab-${tab.name}`, role: "tab", "aria-controls": `panel-${tab.name}`,
      }));
      const panel = h("section", {
        id: `panel-${tab.name}`, class: `panel ${tab.name}`, role: "tabpanel", "aria-labelledby": `tab-${tab.name}`,
      });
      panels.append(panel);
      const lack = tab.lacks?.(about);
      if (lack) panel.append(h("p", { class: "quiet hint" }, lack));
      else app.views[tab.name] = new tab.View(panel, app);
    }
    heads.addEventListener("keydown", (event) => onArrow(event, app));
    document.addEventListener("keydown", (event) => onKey(event, app.view));
    const wanted = location.hash.slice(1);
    open(TABS.some((tab) => tab.name === wanted) ? wanted : TABS[0].name, app);
  } catch (error) {
    problem.show(error.message);
  }
}

start();
