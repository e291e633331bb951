// The page: what happens when.

import { Refused, Server } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { element, part } from "./elements.js";
import { askKey } from "./key.js";
import { showSeen, showWords } from "./seen.js";
import { showState } from "./state.js";
import { troubleOf } from "./trouble.js";
import { ending, whole } from "./words.js";

const PROMISES = {
  masked: "At masked, the worker should see nothing but noise. This page shows what it was sent, so that you can judge.",
  verified: "At verified, each product is checked, and nothing is hidden: the worker sees your words.",
  open: "At open, nothing is hidden: the worker sees your words.",
  local: "At local there is no worker, and nothing to see.",
};
const PATIENCE = 5; // times that an answer is asked for while the server looks at another one

const server = new Server();
const chat = new Chat();
const composer = new Composer(ask, stop);
let conversation = new Conversation();
let about = null; // what the server said of itself when it was asked last
let connecting = null; // the question that asks for that, while there is one
let running = null; // stops the answer under way
let shown = null; // the turn that the panel shows

/** Asks the server who it is, and for a key until one is right. False where none was given. One question at a time. */
function connect() {
  connecting ??= connected().finally(() => (connecting = null));
  return connecting;
}

async function connected() {
  let problem = "";
  for (;;) {
    try {
      about = await server.about();
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 401) throw error;
      showState("nokey");
      const key = await askKey(problem);
      if (key === null) return false;
      server.useKey(key);
      problem = "The server does not take this key.";
      continue;
    }
    part("model").textContent = about.model;
    part("protection").textContent = about.protection;
    part("promise").textContent = PROMISES[about.protection] ?? "";
    showState(running ? "answering" : "ready");
    return true;
  }
}

/** Asks the server who it is while no message waits for that. */
function showServer() {
  connect().catch((error) => {
    showState("failed");
    part("promise").textContent = error.message;
  });
}

async function ask(question) {
  const turn = chat.add(question);
  running = new AbortController();
  part("reset").hidden = true;
  composer.answering(true);
  showTurn(null);
  showWords("Not yet.", "What the worker saw is told when the answer is whole.");
  showState("answering");
  let sent = false;
  try {
    await stillTheSame(running.signal);
    sent = true;
    await answer(turn);
  } catch (error) {
    broken(turn, error, sent);
  } finally {
    running = null;
    composer.answering(false);
    part("reset").hidden = false;
    chat.settle();
  }
}

/** Before each message: a server that came back may be another one. Throws Refused before the message leaves. */
async function stillTheSame(signal) {
  const before = about?.protection;
  if (!(await unlessStopped(connect(), signal))) throw new Refused(401, "invalid_api_key", "The server asks for a key.");
  if (before === undefined || before === about.protection) return;
  const text = `The server is at ${about.protection} now, and was at ${before}. Your message was not sent.`;
  throw new Refused(0, "changed", text);
}

async function answer(turn) {
  const request = {
    model: about.model,
    messages: conversation.asking(turn.question, composer.system),
    ...composer.parameters(),
  };
  const { reason, seen } = await received(turn, request);
  conversation.keep(turn.question, turn.answer);
  turn.unnote("paused");
  turn.end([seen && `${whole(seen.tokens)} tokens.`, ending(reason)].filter(Boolean).join(" "));
  if (seen) {
    turn.offer(() => {
      showTurn(turn, seen);
      part("seen").focus();
    });
    showTurn(turn, seen);
  }
  showState("ready");
}

/** Reads one answer to its end; waits where the server looks at another one, which may be one that was just stopped. */
async function received(turn, request) {
  const { signal } = running;
  for (let tries = 1; ; tries++) {
    try {
      const told = { reason: "", seen: null };
      showState("answering");
      for await (const { kind, value } of server.answer(request, signal)) {
        turn.unnote("busy");
        if (kind === "text") turn.append(value);
        if (kind === "finish") told.reason = value;
        if (kind === "state") workerChanged(turn, value);
        if (kind === "seen") told.seen = value;
        chat.follow();
      }
      return told;
    } catch (error) {
      if (error.code !== "console_busy" || tries === PATIENCE) throw error;
      turn.note("busy", "Waiting.", "The server looks at one answer at a time, and at another one now.");
      await unlessStopped(passing(error.retryAfter ?? 1), signal);
    }
  }
}

/** Resolves after so many seconds. */
function passing(seconds) {
  return new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
}

/** What comes of a promise. Rejects when stopped before. */
function unlessStopped(promise, signal) {
  return new Promise((resolve, reject) => {
    promise.then(resolve, reject);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

/** The worker's state has changed while it answers; `expelled` are those that were sent away since the answer began. */
function workerChanged(turn, { state, expelled }) {
  if (expelled.length > turn.caught) {
    turn.caught = expelled.length;
    const text = `It gave a wrong product, or broke the protocol, and was sent away: ${expelled.join(", ")}. Nothing of it was used.`;
    turn.note("caught", "A worker or dealer was caught.", text);
  }
  if (state === "reconnecting") {
    turn.note("paused", "Paused.", "The worker is lost. The answer goes on by itself when there is one again.");
    showState("paused");
  }
  if (state === "ready") {
    if (turn.unnote("paused")) {
      turn.note("went-on", "Went on.", "The worker was lost for a while. The text is the same as without the pause.");
    }
    showState("answering");
  }
}

/** An answer that does not come to its end; `sent`: whether the server may have its question. */
function broken(turn, error, sent) {
  const { kind, title, text, state, again } = troubleOf(error, sent);
  turn.unnote("paused");
  turn.unnote("busy");
  turn.end("");
  const button = element("button", { type: "button", class: "quiet" }, "Ask again");
  button.addEventListener("click", () => composer.fill(turn.question));
  turn.note(kind, title, text, again ? button : null);
  showTurn(null);
  if (kind === "stopped" && sent) {
    conversation.keep(turn.question, turn.answer);
    showWords("Not told.", "You stopped this answer. The copy of what the worker was sent was thrown away at once.");
  } else if (!sent || (error.status >= 400 && error.status < 500)) {
    showWords("Nothing.", "This answer was not begun.");
  } else if (error.code === "other_mode") {
    showWords("Not told.", `${error.message} This page read no more of the answer.`);
  } else {
    showWords("Nothing to show.", "The answer did not come to its end. The copy of what the worker was sent was thrown away.");
  }
  showState(state);
  if (error.code === "other_protection" || error.code === "other_mode") showServer(); // as it is now
}

function stop() {
  running?.abort();
}

/** Shows a turn in the panel, and marks it in the conversation. */
function showTurn(turn, seen) {
  shown?.shown(false);
  shown = turn;
  if (turn === null) return;
  turn.shown(true);
  showSeen(turn.question, seen);
}

function welcome() {
  conversation = new Conversation();
  chat.clear();
  showTurn(null);
  part("reset").hidden = true;
  showWords("Nothing yet.", "After each answer: the bytes that the worker was sent, as a picture and beside uniform noise, and what an attacker reads in them.");
}

part("reset").addEventListener("click", () => {
  welcome();
  composer.fill("");
});
addEventListener("pagehide", stop); // a browser may keep a page that was left, and its answer would go on
welcome();
showServer();
