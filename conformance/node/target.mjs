// The server under test, as conformance/test_node.py tells of it.
import assert from "node:assert/strict";

export const API = process.env.TSQP_API;
export const KEY = process.env.TSQP_KEY;
export const MODEL = process.env.TSQP_MODEL;

export const MESSAGES = [
  { role: "system", content: "Be brief." },
  { role: "user", content: "Hello?" },
];
export const CITIES = ["Oslo", "Rome"];

async function total(name, label = "") {
  const page = await (await fetch(process.env.TSQP_METRICS)).text();
  const lines = page.split("\n").filter((line) => line.startsWith(name) && line.includes(label));
  return lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" "))), 0);
}

export const aborted = () => total("vllm:request_success_total", 'finished_reason="abort"');

/** Until one request more has been given up than before; the test's own time is the limit. */
export async function isAborted(before) {
  while ((await aborted()) <= before) await new Promise((resolve) => setTimeout(resolve, 10));
  assert.equal(await aborted(), before + 1);
}
