// Reads server-sent events from the body of an answer (EventSource cannot POST).

/**
 * Yields `{name, data}` of each event; `name` is "" where the event has none. Comments are passed over.
 * Lines end by LF, CRLF or CR, wherever the network cuts the bytes. An event that the stream breaks off in is none.
 */
export async function* eventsOf(body) {
  let event = { name: "", data: [] };
  for await (const line of linesOf(body)) {
    if (line === "") {
      if (event.data.length > 0) yield { name: event.name, data: event.data.join("\n") };
      event = { name: "", data: [] };
      continue;
    }
    const colon = line.indexOf(":");
    if (colon === 0) continue; // a comment: the server is still there
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") event.name = value;
    if (field === "data") event.data.push(value);
  }
}

async function* linesOf(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // a character may be cut in two by the network
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        if (rest.endsWith("\r")) yield rest.slice(0, -1);
        return;
      }
      rest += decoder.decode(value, { stream: true });
      // A CR at the end may be the first half of a CRLF: it waits for what comes next.
      const whole = rest.endsWith("\r") ? rest.slice(0, -1) : rest;
      const lines = whole.split(/\r\n|\n|\r/);
      rest = lines.pop() + rest.slice(whole.length);
      yield* lines;
    }
  } finally {
    await reader.cancel().catch(() => {}); // left early: the server is told, and stops
  }
}
