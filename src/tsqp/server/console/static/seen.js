// The panel: what the worker saw of one answer.

import { element, part } from "./elements.js";
import { extremes, histogram } from "./histogram.js";
import { bytesOf, picture } from "./picture.js";
import { bytes, numbers, probability, shares, uniformity, verdict, whole } from "./words.js";

/** Before, during and after an answer of which there is nothing to show: a title and a sentence. */
export function showWords(title, text) {
  fill("none", verdictPart("none", title, text));
}

/** What the event `seen` says about the answer to `question`. */
export function showSeen(question, seen) {
  const { kind, title, text } = verdict(seen);
  const parts = [element("p", { class: "about" }, question), verdictPart(kind, title, text)];
  if (seen.calls > 0) parts.push(attackPart(kind, seen), picturePart(seen), histogramPart(seen));
  parts.push(numbersPart(seen));
  fill(kind, ...parts);
}

function fill(kind, ...parts) {
  part("seen").dataset.kind = kind;
  part("seen-body").replaceChildren(...parts);
}

function verdictPart(kind, title, text) {
  return element(
    "div",
    { class: "verdict", "data-kind": kind },
    element("p", { class: "headline" }, title),
    element("p", {}, text),
  );
}

function attackPart(kind, seen) {
  const title = kind === "words" ? "An attacker reads:" : "An attacker makes this of it:";
  return element(
    "section",
    { class: "attack" },
    element("h3", {}, title),
    element("blockquote", { class: "text recovered", tabindex: "0", "aria-label": title }, seen.recovered_text),
    element("p", { class: "small" }, shares(seen)),
  );
}

function picturePart(seen) {
  const dots = bytesOf(seen.picture);
  const rows = Math.ceil(dots.length / seen.picture_width);
  const caption = `${seen.picture_of}: ${whole(rows)} rows of ${whole(seen.picture_width)} numbers, a dot for each, the lighter the larger.`;
  const style = getComputedStyle(document.documentElement);
  const ramp = ["--dot-low", "--dot-high"].map((name) => style.getPropertyValue(name).split(",").map(Number));
  return element(
    "figure",
    {},
    element("h3", {}, "As a picture"),
    picture(dots, seen.picture_width, ramp, `Picture of what was sent. ${caption}`),
    element("figcaption", { class: "small" }, caption),
  );
}

function histogramPart(seen) {
  const { least, most } = extremes(seen.histogram, seen.histogram_expected);
  const found = `The rarest byte comes ${times(least)} as often as in uniform noise, the most frequent ${times(most)}.`;
  const p = seen.uniformity_p;
  const kept = seen.kept_bytes < seen.bytes_seen ? ` Counted in the first ${bytes(seen.kept_bytes)}.` : "";
  return element(
    "figure",
    {},
    element("h3", {}, "Against uniform noise"),
    histogram(seen.histogram, seen.histogram_expected, `Histogram of the bytes. ${found}`),
    element(
      "figcaption",
      { class: "small" },
      element(
        "span",
        { class: "legend" },
        element("span", { class: "sent" }, "bytes that were sent"),
        element("span", { class: "noise" }, "uniform noise, and where 997 of 1,000 bars of it would end"),
      ),
      element("span", {}, `${found}${kept}`),
      element(
        "span",
        { class: "p", "data-p": String(p) },
        element("strong", {}, p === null ? "No p-value." : `p = ${probability(p)}.`),
        ` ${uniformity(p)}`,
      ),
    ),
  );
}

function numbersPart(seen) {
  const rows = numbers(seen).map(([term, value, meaning]) =>
    element(
      "div",
      {},
      element("dt", {}, term),
      element("dd", {}, element("span", { class: "value" }, value), element("span", { class: "small" }, meaning)),
    ),
  );
  return element("dl", { class: "numbers" }, ...rows);
}

function times(ratio) {
  return `${ratio < 10 ? ratio.toFixed(2) : whole(ratio)}×`;
}
