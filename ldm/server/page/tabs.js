// The tabs of the page. A tab is a module: {name, title, start(panel, app)}; shown(app) if it is to know when it is opened,
// and key(event, app) for the keys that are pressed while it is open.

import { compare } from "./compare.js";
import { generate } from "./generate.js";
import { kept } from "./kept.js";

export const TABS = [generate, compare, kept];
