// The three endpoints of the console, and what they say when they refuse.

import { eventsOf } from "./events.js";

const ABOUT_MS = 15000;

/** A refusal: `status` of the answer (0 where there was none), `code` and text of the error, seconds to wait or null. */
export class Refused extends Error {
  constructor(status, code, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** The server, asked with a key that is kept in this object alone. */
export class Server {
  #key = "";
  #protection = ""; // what it said last

  useKey(key) {
    this.#key = key;
  }

  /** Model, protection, fingerprint, context, version. Throws Refused, also where that takes too long. */
  async about() {
    const signal = AbortSignal.timeout(ABOUT_MS); // every message waits for this one question
    const response = await this.#fetch("console/about", { method: "GET", signal });
    const about = await response.json().catch(() => {
      throw unreachable();
    });
    this.#protection = about.protection;
    return about;
  }

  /**
   * Yields `{kind, value}` of one answer: "text" with a piece of it, "finish" with the reason, "state" and "seen" with
   * what those events say. Throws Refused where the server ends it by an error, or the stream breaks off. A server that is
   * at another protection than `about` said refuses by "other_protection" and computes nothing; one that answers all the
   * same is "other_mode", and may have shown the message to its worker.
   */
  async *answer(body, signal) {
    const response = await this.#fetch("console/answer", {
      method: "POST",
      headers: { "x-tsqp-expect-protection": this.#protection },
      body: JSON.stringify({ ...body, stream: true, n: 1 }),
      signal,
    });
    const protection = response.headers.get("x-tsqp-protection");
    if (protection !== this.#protection) {
      await response.body.cancel();
      const text = `Your message was sent, and answered at ${protection ?? "no known protection"}: the worker may have read it.`;
      throw new Refused(0, "other_mode", text);
    }
    for await (const { name, data } of eventsWhileConnected(response.body)) {
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new Refused(response.status, value.error.code, value.error.message);
      if (name) {
        yield { kind: name, value };
        continue;
      }
      const [choice] = value.choices ?? [];
      if (choice?.delta?.content) yield { kind: "text", value: choice.delta.content };
      if (choice?.finish_reason) yield { kind: "finish", value: choice.finish_reason };
    }
    throw cut();
  }

  async #fetch(path, options) {
    const headers = { "content-type": "application/json", ...options.headers };
    if (this.#key) headers.authorization = `Bearer ${this.#key}`;
    let response;
    try {
      response = await fetch(path, {
        ...options,
        headers,
        cache: "no-store",
        credentials: "omit",
        redirect: "error",
        referrerPolicy: "no-referrer",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw unreachable();
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

async function* eventsWhileConnected(body) {
  try {
    yield* eventsOf(body);
  } catch (error) {
    throw error.name === "AbortError" ? error : cut();
  }
}

function unreachable() {
  return new Refused(0, "unreachable", "The server cannot be reached.");
}

function cut() {
  return new Refused(0, "cut", "The connection ended before the answer did.");
}

async function refusal(response) {
  const { error } = await response.json().catch(() => ({}));
  const wait = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
  const text = error?.message ?? `The server answered with status ${response.status}.`;
  return new Refused(response.status, error?.code ?? null, text, Number.isNaN(wait) ? null : wait);
}
