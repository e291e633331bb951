// What is said of an answer that did not come to its end. Pure: it only picks words.

import { Refused } from "./api.js";

const CHEATED = ["worker_cheated", "check_failed"];
const CHANGED = ["changed", "other_protection", "other_mode"]; // found before the message was sent, by the server, after it
const NOT_GIVEN = " Your message reached the server and was not given to the model.";

/**
 * `{kind, title, text, state, again}`: a note, the state of the page after it, and whether to offer to ask again.
 * `sent`: whether the server may have the question.
 */
export function troubleOf(error, sent) {
  if (error.name === "AbortError") {
    const text = sent ? "The server was told, and computes no more of it." : "Your message was not sent.";
    return { kind: "stopped", title: "Stopped.", text, state: "ready", again: !sent };
  }
  if (!(error instanceof Refused)) {
    return { kind: "failed", title: "This page failed.", text: String(error), state: "failed", again: true };
  }
  if (CHEATED.includes(error.code)) {
    const text = "It gave a wrong product, and a check found that. Nothing was made of the product; the answer ends here.";
    return { kind: "caught", title: "A worker or dealer was caught.", text, state: "caught", again: false };
  }
  if (CHANGED.includes(error.code)) {
    const text = `${sentence(error.message)}${error.code === "other_protection" ? NOT_GIVEN : ""}`;
    return { kind: "failed", title: "Protection changed.", text, state: "ready", again: true };
  }
  if (error.status === 401) {
    const text = "The server asks for a key. Ask again to give one.";
    return { kind: "failed", title: "Key needed.", text, state: "nokey", again: true };
  }
  if (error.status === 429) {
    const when = error.retryAfter ? `in ${error.retryAfter} s` : "a little later";
    return { kind: "busy", title: "Busy.", text: `${sentence(error.message)} Ask again ${when}.`, state: "ready", again: true };
  }
  return { kind: "failed", title: "Failed.", text: sentence(error.message), state: "failed", again: true };
}

/** Errors of the API begin small and have no full stop. */
function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
