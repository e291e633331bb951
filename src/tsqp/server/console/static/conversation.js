// What was said so far, as the server is told it. It is in the page's memory alone.

/** Messages of the chat API for the next request. */
export class Conversation {
  #said = [];

  /** The messages with which `question` is asked; `system` comes first where there is one. */
  asking(question, system) {
    const before = this.#said.flatMap(({ question, answer }) => [
      { role: "user", content: question },
      { role: "assistant", content: answer },
    ]);
    const first = system ? [{ role: "system", content: system }] : [];
    return [...first, ...before, { role: "user", content: question }];
  }

  /** Keeps an answer, also one that was stopped. One without text is as if it was never asked for. */
  keep(question, answer) {
    if (answer) this.#said.push({ question, answer });
  }

  forget() {
    this.#said = [];
  }
}
