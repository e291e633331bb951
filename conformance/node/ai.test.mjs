// npm's ai, with @ai-sdk/openai-compatible and with @ai-sdk/openai (chat and responses).
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { API, CITIES, KEY, MODEL, aborted, isAborted } from "./target.mjs";

const compatible = createOpenAICompatible({
  name: "tsqp", baseURL: API, apiKey: KEY, includeUsage: true, supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL: API, apiKey: KEY });
const MODELS = { "openai-compatible": compatible(MODEL), "openai, chat": openai.chat(MODEL), "openai, responses": openai.responses(MODEL) };
const ASKED = { system: "Be brief.", prompt: "Hello?", temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
const ENDLESS = { ...ASKED, maxOutputTokens: 1900 };
const City = z.object({ city: z.enum(CITIES), large: z.boolean() });

for (const [name, model] of Object.entries(MODELS)) {
  test(`${name}: text, whole and as a stream`, async () => {
    const whole = await generateText({ ...ASKED, model });
    const streamed = streamText({ ...ASKED, model });
    let text = "";
    for await (const piece of streamed.textStream) text += piece;
    assert.equal(text, whole.text);
    assert.equal(await streamed.finishReason, whole.finishReason);
    assert.ok(["length", "stop"].includes(whole.finishReason));
    const usage = await streamed.usage;
    assert.deepEqual([usage.inputTokens, usage.outputTokens], [whole.usage.inputTokens, whole.usage.outputTokens]);
    assert.ok(usage.inputTokens > 0 && usage.outputTokens > 0);
    assert.deepEqual(whole.warnings ?? [], []);
  });

  test(`${name}: a tool is called, and its outcome goes back`, async () => {
    const called = [];
    const weather = tool({
      description: "The weather of a city.",
      inputSchema: z.object({ city: z.enum(CITIES) }),
      execute: ({ city }) => {
        called.push(city);
        return { sky: "clear" };
      },
    });
    const asked = { ...ASKED, maxOutputTokens: 300, model, tools: { weather }, toolChoice: "required", stopWhen: stepCountIs(2) };
    const whole = await generateText(asked);
    assert.equal(whole.steps.length, 2);
    assert.ok(called.length >= 2 && called.every((city) => CITIES.includes(city)));
    assert.equal(whole.steps[0].finishReason, "tool-calls");
    const streamed = streamText(asked);
    await streamed.consumeStream();
    const steps = await streamed.steps;
    const calls = (step) => step.toolCalls.map((call) => call.input);
    assert.deepEqual(steps.map(calls), whole.steps.map(calls));
  });

  test(`${name}: one tool by name`, async () => {
    const tools = { weather: tool({ inputSchema: z.object({ city: z.enum(CITIES) }) }), other: tool({ inputSchema: z.object({}) }) };
    const whole = await generateText({ ...ASKED, maxOutputTokens: 300, model, tools, toolChoice: { type: "tool", toolName: "weather" } });
    assert.deepEqual(whole.toolCalls.map((call) => call.toolName), ["weather"]);
  });

  test(`${name}: an object, whole and as a stream`, async () => {
    const asked = { ...ASKED, maxOutputTokens: 300, model, schema: City };
    const whole = await generateObject(asked);
    City.parse(whole.object);
    const streamed = streamObject(asked);
    for await (const _ of streamed.partialObjectStream);
    assert.deepEqual(await streamed.object, whole.object);
  });

  test(`${name}: an object beside tools that may be called`, async () => {
    const tools = { weather: tool({ inputSchema: z.object({ city: z.enum(CITIES) }) }) };
    const whole = await generateText({ ...ASKED, maxOutputTokens: 300, model, tools, output: Output.object({ schema: City }) });
    if (whole.finishReason === "stop") City.parse(whole.output);
    else assert.equal(whole.finishReason, "tool-calls");
  });

  test(`${name}: a stream that is aborted ends on the server`, async () => {
    const before = await aborted();
    const controller = new AbortController();
    const parts = [];
    const streamed = streamText({ ...ENDLESS, model, abortSignal: controller.signal, onError: () => {} });
    for await (const part of streamed.fullStream) {
      parts.push(part.type);
      if (part.type === "text-delta") controller.abort();
    }
    assert.ok(parts.includes("abort"));
    await isAborted(before);
  });

  test(`${name}: errors tell their status, and whether to ask again`, async () => {
    const refused = async (asked, status) => {
      await assert.rejects(generateText(asked), (error) => {
        assert.ok(APICallError.isInstance(error), String(error));
        assert.equal(error.statusCode, status);
        assert.equal(error.isRetryable, false);
        assert.ok(error.data?.error?.message, "the error is not in the shape that the client reads");
        return true;
      });
    };
    await refused({ ...ASKED, model, maxOutputTokens: 100_000 }, 400);
    await refused({ ...ASKED, model, temperature: 3 }, 400);
  });
}

test("who is a stranger, and a model that is none", async () => {
  for (const make of [
    (key, model) => createOpenAICompatible({ name: "tsqp", baseURL: API, apiKey: key })(model),
    (key, model) => createOpenAI({ baseURL: API, apiKey: key }).responses(model),
  ]) {
    const status = (expected) => (error) => APICallError.isInstance(error) && error.statusCode === expected;
    await assert.rejects(generateText({ ...ASKED, model: make("wrong", MODEL) }), status(401));
    await assert.rejects(generateText({ ...ASKED, model: make(KEY, "other") }), status(404));
  }
});
