// One question and its answer, as they stand in the conversation.

import { element } from "./elements.js";

/** A turn; `node` is its element. Text of the answer is appended as it comes and read by nobody. */
export class Turn {
  caught = 0; // workers and dealers, as far as it was said
  #answer = document.createTextNode("");
  #notes = element("div", { class: "notes" });
  #foot = element("div", { class: "foot" });
  #look = null;

  constructor(question) {
    this.question = question;
    this.node = element(
      "article",
      { class: "turn", "data-writing": "" },
      element("h3", { class: "overline" }, "You"),
      element("p", { class: "text question" }, question),
      element("h3", { class: "overline" }, "Model"),
      element("p", { class: "text answer" }, this.#answer),
      this.#notes,
      this.#foot,
    );
  }

  get answer() {
    return this.#answer.data;
  }

  append(text) {
    this.#answer.appendData(text);
  }

  /** A note below the answer; one of the same kind takes its place. `kind`: paused, went-on, caught, failed, stopped. */
  note(kind, title, text, ...children) {
    const made = element(
      "div",
      { class: "note", "data-kind": kind, role: kind === "caught" || kind === "failed" ? "alert" : null },
      element("p", {}, element("strong", {}, title), ` ${text}`),
      ...children,
    );
    const old = this.#notes.querySelector(`[data-kind="${kind}"]`);
    if (old) old.replaceWith(made);
    else this.#notes.append(made);
  }

  /** Takes the note of this kind away; says whether there was one. */
  unnote(kind) {
    const note = this.#notes.querySelector(`[data-kind="${kind}"]`);
    note?.remove();
    return note !== null;
  }

  /** The answer is at its end; `facts` is a line of words about it. */
  end(facts) {
    delete this.node.dataset.writing;
    if (facts) this.#foot.prepend(element("span", {}, facts));
  }

  /** Offers to look at what the worker saw; `look` is called when somebody does. */
  offer(look) {
    this.#look = element("button", { type: "button", class: "quiet look", "aria-controls": "seen" }, "What the worker saw");
    this.#look.addEventListener("click", look);
    this.#foot.append(this.#look);
  }

  /** Whether this is the turn that the panel shows. */
  shown(is) {
    this.#look?.setAttribute("aria-pressed", is);
  }
}
