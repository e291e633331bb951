// Bytes as a picture: one dot a byte, row by row, the lighter the larger. Tones are by rank: the bytes of a picture take all
// tones, however close they are to each other. What has a pattern shows it; noise stays noise.

import { element } from "./elements.js";

const LEAST_HEIGHT = 150; // canvas pixels: few rows are drawn as broad lines

/** A canvas of `width` dots a row; `ramp` are two colours `[r, g, b]`, of the least byte and the largest. */
export function picture(bytes, width, ramp, label) {
  const rows = Math.ceil(bytes.length / width);
  const thick = Math.max(1, Math.round(LEAST_HEIGHT / Math.max(1, rows)));
  const canvas = element("canvas", { width, height: rows * thick, role: "img", "aria-label": label });
  const context = canvas.getContext("2d");
  if (rows === 0) return canvas;
  const image = context.createImageData(width, rows * thick);
  const dots = new Uint32Array(image.data.buffer);
  const colours = palette(ramp, tones(bytes));
  for (let at = 0; at < bytes.length; at++) {
    const row = Math.floor(at / width);
    for (let line = 0; line < thick; line++) {
      dots[(row * thick + line) * width + (at % width)] = colours[bytes[at]];
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Base64 as bytes. */
export function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
}

/** The share of `bytes` that are smaller than each byte value, or the same and counted half: 0 to 1. */
export function tones(bytes) {
  const counts = new Array(256).fill(0);
  for (const byte of bytes) counts[byte] += 1;
  let below = 0;
  return counts.map((count) => {
    const tone = (below + count / 2) / bytes.length;
    below += count;
    return tone;
  });
}

/** The colours of all bytes, each as it lies in the memory of an image. */
function palette([from, to], tones) {
  const colours = new Uint32Array(256);
  const channels = new Uint8ClampedArray(colours.buffer);
  tones.forEach((tone, byte) => {
    for (let channel = 0; channel < 3; channel++) {
      channels[4 * byte + channel] = from[channel] + (to[channel] - from[channel]) * tone;
    }
    channels[4 * byte + 3] = 255;
  });
  return colours;
}
