// What the tests of user interfaces share. They use a server at BELAY_AGENT_URL with the project
// tests/projects/react, and the stand-in for its model at BELAY_MODEL_URL.

import assert from "node:assert/strict";
import { Client } from "@langchain/langgraph-sdk";

export const apiUrl = process.env.BELAY_AGENT_URL;
export const client = new Client({ apiUrl });

export function pause(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Check until it succeeds; throw its last error after 30 seconds. */
export async function eventually(check) {
  const end = Date.now() + 30_000;
  for (;;) {
    try {
      return await check();
    } catch (error) {
      if (Date.now() > end) throw error;
    }
    await pause(10);
  }
}

let said = 100_000 + Math.floor(Math.random() * 800_000);

/** A message that is answered for hours, and that no other test sends. */
export function endless() {
  said += 1;
  return `say ${said}`;
}

/** The calls of the model whose last message is this text. */
export async function modelCalls(text) {
  const calls = await (await fetch(`${process.env.BELAY_MODEL_URL}/calls`)).json();
  return calls.filter((call) => call.last_message === text);
}

/** The statuses of a thread's runs, the newest first. */
export async function statuses(threadId) {
  return (await client.runs.list(threadId)).map((run) => run.status);
}

/** Assert that the runs of the thread, and the calls that they made for this text, have ended.
 * A run that goes on would make the next one wait. */
export async function assertNothingRuns(threadId, text) {
  const input = { messages: [{ role: "user", content: "next" }] };
  const values = await client.runs.wait(threadId, "agent", { input });
  assert.equal(values.messages.at(-1).content.trim(), "ok");
  const found = await statuses(threadId);
  assert.ok(found.every((status) => ["success", "interrupted"].includes(status)), String(found));
  await eventually(async () => {
    const calls = await modelCalls(text);
    assert.ok(calls.every((call) => call.has_ended), JSON.stringify(calls));
  });
  return found;
}
