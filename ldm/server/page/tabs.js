// The tabs of the page. A tab is a module: {name, title, View}, and `lacks(about)` if there are servers without it: what they
// lack, in words. `app.views` has its view by its name, made by `new View(panel, app)`; a view has shown() if it is to know
// when it is opened, begin() for Ctrl+Enter and cancel() for Escape while it is open.

import { compare } from "./compare.js";
import { generate } from "./generate.js";
import { kept } from "./kept.js";
import { train } from "./train.js";

export const TABS = [generate, compare, kept, train];
