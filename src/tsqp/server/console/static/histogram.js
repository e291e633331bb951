// How often each byte occurs, beside how often it would in uniform noise: bars, a line and a band, all SVG elements.

import { svg } from "./elements.js";

const HEIGHT = 96; // the drawing has a width of one unit a byte
const LIKELY = 3; // standard deviations: where 997 of 1,000 bars of noise are

/** The drawing. `counts`: how often each byte came; `shares`: how often it would, of 1; both have 256 entries. */
export function histogram(counts, shares, label) {
  const total = counts.reduce((sum, one) => sum + one, 0);
  const expected = shares.map((share) => share * total);
  const spread = expected.map((one) => LIKELY * Math.sqrt(one));
  const top = 1.08 * Math.max(1, ...counts, ...expected.map((one, byte) => one + spread[byte]));
  const y = (value) => HEIGHT - (HEIGHT * Math.max(0, value)) / top;
  const bars = counts.map((one, byte) =>
    svg("rect", { class: "bar", x: byte, y: y(one).toFixed(2), width: 1, height: (HEIGHT - y(one)).toFixed(2) }),
  );
  const above = expected.map((one, byte) => `${byte} ${y(one + spread[byte])} ${byte + 1} ${y(one + spread[byte])}`);
  const below = expected.map((one, byte) => `${byte + 1} ${y(one - spread[byte])} ${byte} ${y(one - spread[byte])}`);
  const line = expected.map((one, byte) => `${byte} ${y(one)} ${byte + 1} ${y(one)}`);
  return svg(
    "svg",
    { class: "histogram", viewBox: `0 0 ${counts.length} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    svg("g", {}, ...bars),
    svg("polygon", { class: "band", points: [...above, ...below.reverse()].join(" ") }),
    svg("polyline", { class: "line", points: line.join(" ") }),
  );
}

/** How far the bytes are from uniform: the least and the largest ratio of what came to what noise would give. */
export function extremes(counts, shares) {
  const total = counts.reduce((sum, one) => sum + one, 0);
  const ratios = counts.map((one, byte) => one / (shares[byte] * total)).filter(Number.isFinite);
  return { least: Math.min(...ratios), most: Math.max(...ratios) };
}
