// The state of the page: one word in the bar, the same for eyes and for screen readers.

import { part } from "./elements.js";

const WORDS = {
  connecting: "Connecting",
  nokey: "Key needed",
  ready: "Ready",
  answering: "Answering",
  paused: "Paused",
  caught: "Caught",
  failed: "Failed",
};

/** Shows one of the states of `WORDS`. */
export function showState(state) {
  const status = part("status");
  if (status.dataset.state === state) return; // said once, not again with each piece of an answer
  status.dataset.state = state;
  status.textContent = WORDS[state];
}
