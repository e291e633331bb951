// npm's openai.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { API, CITIES, KEY, MESSAGES, MODEL, aborted, isAborted } from "./target.mjs";

const client = new OpenAI({ baseURL: API, apiKey: KEY, maxRetries: 0 });
const SEEDED = { model: MODEL, messages: MESSAGES, seed: 5, max_tokens: 24 };
const City = z.object({ city: z.enum(CITIES), large: z.boolean() });
const WEATHER = {
  type: "function",
  function: {
    name: "weather",
    parameters: { type: "object", properties: { city: { enum: CITIES } }, required: ["city"], additionalProperties: false },
  },
};

test("the model is listed and found, with a slash in its name", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.deepEqual(names, [MODEL]);
  assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
});

test("chat, whole and as a stream, is the same text and the same usage", async () => {
  const { data: whole, request_id: id } = await client.chat.completions.create(SEEDED).withResponse();
  assert.match(id, /^req_/);
  let text = "";
  let usage = null;
  let reason = null;
  const stream = await client.chat.completions.create({ ...SEEDED, stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    reason ??= chunk.choices[0]?.finish_reason;
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(reason, whole.choices[0].finish_reason);
  assert.deepEqual(usage, whole.usage);
  assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
});

test("the helper of streams sees each event and the whole", async () => {
  const seen = [];
  const runner = client.chat.completions.stream(SEEDED).on("content", (delta) => seen.push(delta));
  const whole = await client.chat.completions.create(SEEDED);
  assert.equal(await runner.finalContent(), whole.choices[0].message.content);
  assert.equal(seen.join(""), whole.choices[0].message.content);
});

test("several choices and log-probabilities", async () => {
  const whole = await client.chat.completions.create({ ...SEEDED, n: 2, logprobs: true, top_logprobs: 2 });
  assert.equal(whole.choices.length, 2);
  for (const choice of whole.choices) {
    const bytes = choice.logprobs.content.flatMap((token) => token.bytes);
    assert.equal(Buffer.from(bytes).toString(), choice.message.content);
  }
});

for (const choice of ["required", { type: "function", function: { name: "weather" } }]) {
  test(`a call that must come, ${typeof choice === "string" ? choice : "by name"}`, async () => {
    const asked = { ...SEEDED, max_tokens: 300, tools: [WEATHER], tool_choice: choice, parallel_tool_calls: false };
    const whole = await client.chat.completions.create(asked);
    const [call] = whole.choices[0].message.tool_calls;
    assert.equal(call.function.name, "weather");
    assert.ok(CITIES.includes(JSON.parse(call.function.arguments).city));
    const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
    assert.deepEqual(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
    assert.equal(streamed.choices[0].finish_reason, whole.choices[0].finish_reason);
  });
}

test("the helper of tools calls the function with what the model wrote", async () => {
  const called = [];
  const tool = zodFunction({
    name: "weather",
    parameters: z.object({ city: z.enum(CITIES) }),
    function: ({ city }) => void called.push(city),
  });
  const runner = client.chat.completions.runTools({
    ...SEEDED,
    max_tokens: 300,
    tools: [tool],
    tool_choice: { type: "function", function: { name: "weather" } },
  });
  await runner.done();
  assert.equal(called.length, 1);
  assert.ok(CITIES.includes(called[0]));
});

test("the outcome of a call goes back to the model", async () => {
  const first = await client.chat.completions.create({
    ...SEEDED, max_tokens: 300, tools: [WEATHER], tool_choice: "required", parallel_tool_calls: false,
  });
  const { message } = first.choices[0];
  const outcome = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "sunny" };
  const second = await client.chat.completions.create({
    ...SEEDED, messages: [...MESSAGES, message, outcome], tools: [WEATHER],
  });
  assert.ok(second.usage.prompt_tokens > first.usage.prompt_tokens);
});

test("a form is kept, whole and as a stream", async () => {
  const asked = { ...SEEDED, max_tokens: 300, response_format: zodResponseFormat(City, "city") };
  const whole = await client.chat.completions.parse(asked);
  City.parse(whole.choices[0].message.parsed);
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  assert.deepEqual(streamed.choices[0].message.parsed, whole.choices[0].message.parsed);
});

test("a form beside tools that may be called", async () => {
  const asked = { ...SEEDED, max_tokens: 300, tools: [WEATHER], response_format: zodResponseFormat(City, "city") };
  const { message } = (await client.chat.completions.create(asked)).choices[0];
  if (message.tool_calls?.length) assert.ok(CITIES.includes(JSON.parse(message.tool_calls[0].function.arguments).city));
  else City.parse(JSON.parse(message.content));
});

test("responses, whole, as a stream, with a form and with a call", async () => {
  const asked = { model: MODEL, input: "Hello?", max_output_tokens: 24, temperature: 0 };
  const whole = await client.responses.create(asked);
  let text = "";
  for await (const event of await client.responses.create({ ...asked, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, whole.output_text);
  const parsed = await client.responses.parse({ ...asked, max_output_tokens: 300, text: { format: zodTextFormat(City, "city") } });
  City.parse(parsed.output_parsed);
  const tool = { type: "function", ...WEATHER.function, strict: true };
  const called = await client.responses.create({
    ...asked, max_output_tokens: 300, tools: [tool], tool_choice: "required", parallel_tool_calls: false,
  });
  assert.ok(CITIES.includes(JSON.parse(called.output[0].arguments).city));
  const input = [
    { role: "user", content: "Weather?" }, ...called.output,
    { type: "function_call_output", call_id: called.output[0].call_id, output: "sunny" },
  ];
  assert.ok((await client.responses.create({ ...asked, input, tools: [tool] })).usage.output_tokens > 0);
});

test("completions with an echo and log-probabilities", async () => {
  const asked = { model: MODEL, prompt: "abc", max_tokens: 4, temperature: 0, echo: true, logprobs: 1 };
  const [choice] = (await client.completions.create(asked)).choices;
  assert.ok(choice.text.startsWith("abc"));
  assert.equal(choice.logprobs.tokens.length, choice.logprobs.token_logprobs.length);
  assert.equal(choice.logprobs.token_logprobs[0], null);
});

const ENDLESS = { ...SEEDED, max_tokens: 1900, ignore_eos: true };

test("a stream that is aborted ends on the server", async () => {
  const before = await aborted();
  const stream = await client.chat.completions.create({ ...ENDLESS, stream: true });
  await assert.rejects(async () => {
    for await (const chunk of stream) {
      if (chunk.choices[0].delta.content) stream.controller.abort();
    }
    throw new Error("not an abort");
  }, (error) => error.message !== "not an abort").catch((error) => {
    if (!stream.controller.signal.aborted) throw error; // the loop may end without an error after an abort
  });
  await isAborted(before);
});

test("a call that is aborted, and one that takes too long, end on the server", async () => {
  let before = await aborted();
  const controller = new AbortController();
  const call = client.chat.completions.create(ENDLESS, { signal: controller.signal });
  setTimeout(() => controller.abort(), 300);
  await assert.rejects(call, OpenAI.APIUserAbortError);
  await isAborted(before);
  before = await aborted();
  await assert.rejects(client.chat.completions.create(ENDLESS, { timeout: 300 }), OpenAI.APIConnectionTimeoutError);
  await isAborted(before);
});

test("errors have their classes, and are not asked again", async () => {
  let asked = 0;
  const counting = (url, init) => {
    asked += 1;
    return fetch(url, init);
  };
  const persistent = new OpenAI({ baseURL: API, apiKey: KEY, maxRetries: 2, fetch: counting });
  const stranger = new OpenAI({ baseURL: API, apiKey: "wrong", maxRetries: 2, fetch: counting });
  await assert.rejects(stranger.chat.completions.create(SEEDED), OpenAI.AuthenticationError);
  await assert.rejects(
    persistent.chat.completions.create({ ...SEEDED, model: "other" }),
    (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
  );
  await assert.rejects(
    persistent.chat.completions.create({ ...SEEDED, max_tokens: 1e5, stream: true }),
    (error) => error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded" && error.param === "max_tokens",
  );
  await assert.rejects(
    persistent.chat.completions.create({ ...SEEDED, temperature: 3 }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
  );
  await assert.rejects(persistent.embeddings.create({ model: MODEL, input: "x" }), OpenAI.NotFoundError);
  assert.equal(asked, 5);
});
