// The conversation on the page: its turns in their order, and the end kept in sight while it grows.

import { part } from "./elements.js";
import { Turn } from "./turn.js";

export class Chat {
  #following = true;

  constructor() {
    // Who has scrolled away from the end reads something else, and is left there.
    new IntersectionObserver(([entry]) => (this.#following = entry.isIntersecting)).observe(part("end"));
  }

  /** A new turn at the end, in sight. */
  add(question) {
    part("welcome").hidden = true;
    const turn = new Turn(question);
    part("log").append(turn.node);
    part("log").setAttribute("aria-busy", "true"); // a screen reader reads the answer once it is whole
    this.#following = true;
    this.follow();
    return turn;
  }

  /** Something has grown. */
  follow() {
    if (this.#following) part("end").scrollIntoView({ block: "nearest" });
  }

  /** The last turn is whole. */
  settle() {
    part("log").removeAttribute("aria-busy");
    this.follow();
  }

  clear() {
    part("log").replaceChildren();
    part("welcome").hidden = false;
  }
}
