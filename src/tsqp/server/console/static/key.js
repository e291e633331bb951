// Asks for the key. It goes to the one who asked, and the field is emptied: no form, no storage, no address has it.

import { part } from "./elements.js";

const KEY = /^[\x21-\x7e]+$/; // what a header can carry, and a browser sends

/** Opens the dialog; resolves with a key, or with null where it was left by Escape. `problem`: why the last did not do. */
export function askKey(problem = "") {
  const dialog = part("key");
  const input = part("key-input");
  const told = part("key-problem");
  told.textContent = problem;
  if (!dialog.open) dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    const listening = new AbortController();
    const { signal } = listening;
    const done = (key) => {
      listening.abort();
      input.value = "";
      dialog.close();
      resolve(key);
    };
    const use = () => {
      const key = input.value.trim();
      if (KEY.test(key)) done(key);
      else told.textContent = key ? "A key has Latin letters, digits and signs, and no spaces." : "Type a key first.";
    };
    part("key-use").addEventListener("click", use, { signal });
    input.addEventListener("keydown", (event) => event.key === "Enter" && use(), { signal });
    dialog.addEventListener("close", () => done(null), { signal });
  });
}
