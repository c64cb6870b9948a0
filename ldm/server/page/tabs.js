// The tabs of the page. A tab is a module: {name, title, start(panel, app)}, and shown(app) if it is to know.

import { generate } from "./generate.js";
import { kept } from "./kept.js";

export const TABS = [generate, kept];
