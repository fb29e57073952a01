// Gives React a document to live in (jsdom). To be imported before React.

import { JSDOM } from "jsdom";

const { window } = new JSDOM("<!doctype html><body></body>", { url: "http://localhost/" });
const names = ["document", "navigator", "HTMLElement", "Node", "MutationObserver", "sessionStorage"];
for (const name of ["window", ...names]) {
  const value = name === "window" ? window : window[name];
  Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
}
