// Bytes as a picture: one dot a byte, row by row, dark for small and light for large.

import { element } from "./elements.js";

const LEAST_HEIGHT = 150; // canvas pixels: few rows are drawn as broad lines

/** A canvas of `width` dots a row; `ramp` are two colours `[r, g, b]`, of the bytes 0 and 255. */
export function picture(bytes, width, ramp, label) {
  const rows = Math.ceil(bytes.length / width);
  const thick = Math.max(1, Math.round(LEAST_HEIGHT / Math.max(1, rows)));
  const canvas = element("canvas", { width, height: rows * thick, role: "img", "aria-label": label });
  const context = canvas.getContext("2d");
  if (rows === 0) return canvas;
  const image = context.createImageData(width, rows * thick);
  const dots = new Uint32Array(image.data.buffer);
  const colours = palette(ramp);
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

/** The colours of all bytes, each as it lies in the memory of an image. */
function palette([from, to]) {
  const colours = new Uint32Array(256);
  const channels = new Uint8ClampedArray(colours.buffer);
  for (let byte = 0; byte < 256; byte++) {
    for (let channel = 0; channel < 3; channel++) {
      channels[4 * byte + channel] = from[channel] + ((to[channel] - from[channel]) * byte) / 255;
    }
    channels[4 * byte + 3] = 255;
  }
  return colours;
}
