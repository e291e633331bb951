// Where a message is written: the text, its keys, the parameters of the answer.

import { part } from "./elements.js";

export class Composer {
  #text = part("prompt");
  #answering = false;

  /** `send` is called with a message, `stop` with nothing. */
  constructor(send, stop) {
    this.#text.addEventListener("input", () => this.#grow());
    this.#text.addEventListener("keydown", (event) => {
      // While an input method composes a character, Enter and Escape are a part of it.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit(send);
    });
    part("send").addEventListener("click", () => this.#submit(send));
    part("stop").addEventListener("click", stop);
    document.addEventListener("keydown", (event) => {
      if (event.isComposing || event.target.closest("dialog")) return; // there Escape ends something else
      if (event.key === "Escape" && this.#answering) stop();
    });
    for (const example of part("examples").querySelectorAll("button")) {
      example.addEventListener("click", () => this.fill(example.textContent));
    }
  }

  /** Puts a message into the field, for its author to send. */
  fill(text) {
    this.#text.value = text;
    this.#grow();
    this.#text.focus();
  }

  /** Whether an answer is under way: then there is a button that stops it in the place of the one that sends. */
  answering(is) {
    this.#answering = is;
    part("send").hidden = is;
    part("stop").hidden = !is;
    const focused = document.activeElement;
    if (focused === document.body || focused.hidden || focused.closest(".composer")) this.#text.focus();
  }

  /** Fields of the request; those that are empty are the server's to choose. */
  parameters() {
    const fields = {};
    const number = (id, name) => {
      const { value } = part(id);
      if (value !== "") fields[name] = Number(value);
    };
    number("temperature", "temperature");
    number("max-tokens", "max_tokens");
    number("seed", "seed");
    return fields;
  }

  get system() {
    return part("system").value.trim();
  }

  #submit(send) {
    const message = this.#text.value;
    if (this.#answering || message.trim() === "") return;
    const wrong = ["temperature", "max-tokens", "seed"].map(part).find((input) => !input.checkValidity());
    if (wrong) {
      part("options").open = true;
      wrong.reportValidity();
      return;
    }
    this.fill("");
    send(message);
  }

  #grow() {
    this.#text.style.height = "auto";
    this.#text.style.height = `${this.#text.scrollHeight}px`;
  }
}
