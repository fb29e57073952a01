// The JavaScript SDK against a live server at BELAY_URL (`make test-js` starts one).

import assert from "node:assert/strict";
import { test } from "node:test";
import { Client } from "@langchain/langgraph-sdk";

const client = new Client({ apiUrl: process.env.BELAY_URL });

async function all(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

async function newThread() {
  return (await client.threads.create()).thread_id;
}

async function until(condition, what) {
  for (let left = 2000; left > 0; left -= 1) {
    if (await condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  assert.fail(`never: ${what}`);
}

async function untilStatus(threadId, runId, status) {
  await until(
    async () => (await client.runs.get(threadId, runId)).status === status,
    `run ${runId} ${status}`,
  );
}

test("a run is created and joined", async () => {
  const threadId = await newThread();
  const run = await client.runs.create(threadId, "counter", { input: { count: 1 } });
  assert.deepEqual(await client.runs.join(threadId, run.run_id), { count: 2 });
  assert.equal((await client.runs.get(threadId, run.run_id)).status, "success");
  assert.deepEqual((await client.runs.list(threadId)).map((r) => r.run_id), [run.run_id]);
});

test("a run without a thread is waited for", async () => {
  assert.deepEqual(await client.runs.wait(null, "counter", { input: { count: 1 } }), { count: 2 });
});

test("an error is thrown, with its class and message", async () => {
  await assert.rejects(client.runs.wait(null, "bad", { input: {} }), /boom from bad node/);
});

test("a stream has its events in order, and says which run it is", async () => {
  const threadId = await newThread();
  let created;
  const parts = await all(
    client.runs.stream(threadId, "counter", {
      input: { count: 1 },
      streamMode: ["values", "updates", "tasks", "debug", "checkpoints", "events"],
      onRunCreated: (run) => (created = run),
    }),
  );
  assert.equal(parts[0].event, "metadata");
  assert.equal(parts[0].data.run_id, created.run_id);
  assert.equal(created.thread_id, threadId);
  const values = parts.filter((part) => part.event === "values").map((part) => part.data);
  assert.deepEqual(values, [{ count: 1 }, { count: 2 }]);
  for (const name of ["updates", "tasks", "debug", "checkpoints", "events"])
    assert.ok(parts.some((part) => part.event === name), name);
});

test("thousands of events all come, in order", async () => {
  const parts = await all(
    client.runs.stream(null, "teller", {
      input: { topic: "tüa – 🧗", chatter: 5000 },
      streamMode: ["custom", "values"],
    }),
  );
  const custom = parts.filter((part) => part.event === "custom").map((part) => part.data);
  assert.deepEqual(custom, [{ telling: "tüa – 🧗" }, ...Array(5000).keys()]);
  assert.deepEqual(parts.at(-1).data, { told: "plain tüa – 🧗" });
});

test("tokens come one by one", async () => {
  const parts = await all(
    client.runs.stream(null, "speaker", {
      input: { messages: [{ role: "user", content: "hi" }] },
      streamMode: ["messages-tuple"],
    }),
  );
  const chunks = parts.filter((part) => part.event === "messages").map((part) => part.data[0]);
  assert.equal(chunks.map((chunk) => chunk.content).join(""), "one two three");
  assert.ok(chunks.length >= 3);
});

test("a question is asked and answered", async () => {
  const threadId = await newThread();
  const asked = await client.runs.wait(threadId, "questions", { input: { topic: "tea" } });
  assert.equal(asked.__interrupt__[0].value.question, "first about tea?");
  const again = await client.runs.wait(threadId, "questions", { command: { resume: "one" } });
  assert.equal(again.__interrupt__[0].value.question, "second about tea?");
});

test("a joined stream is replayed, and goes on where it was left", async () => {
  const threadId = await newThread();
  const run = await client.runs.create(threadId, "steps", {
    input: { tag: "" },
    streamMode: ["values", "updates"],
    streamResumable: true,
  });
  const whole = await all(client.runs.joinStream(threadId, run.run_id, { lastEventId: "-1" }));
  assert.equal(new Set(whole.map((part) => part.id)).size, whole.length);
  const after = whole[3].id;
  const rest = await all(client.runs.joinStream(threadId, run.run_id, { lastEventId: after }));
  assert.deepEqual(rest, whole.slice(4));
});

for (const action of ["interrupt", "rollback"])
  test(`a run is cancelled with ${action}, and its stream ends`, async () => {
    const threadId = await newThread();
    const events = [];
    for await (const part of client.runs.stream(threadId, "steps", { input: { seconds: 30 } })) {
      events.push(part.event);
      if (part.event === "metadata")
        await client.runs.cancel(threadId, part.data.run_id, true, action);
    }
    assert.equal(events[0], "metadata");
    await until(async () => (await client.threads.get(threadId)).status !== "busy", "idle");
    const left = (await client.runs.list(threadId)).map((run) => run.status);
    assert.deepEqual(left, action === "interrupt" ? ["interrupted"] : []);
  });

test("a client that leaves cancels its run, if it said so", async () => {
  const threadId = await newThread();
  const leaving = new AbortController();
  let runId;
  const stream = client.runs.stream(threadId, "steps", {
    input: { seconds: 30 },
    onDisconnect: "cancel",
    signal: leaving.signal,
    onRunCreated: (run) => (runId = run.run_id),
  });
  await stream.next();
  leaving.abort();
  await untilStatus(threadId, runId, "interrupted");
});

test("cancelOnDisconnect of a joined stream cancels", async () => {
  const threadId = await newThread();
  const run = await client.runs.create(threadId, "steps", { input: { seconds: 30 } });
  await untilStatus(threadId, run.run_id, "running");
  const leaving = new AbortController();
  const joined = client.runs.joinStream(threadId, run.run_id, {
    cancelOnDisconnect: true,
    signal: leaving.signal,
  });
  const first = joined.next().catch(() => undefined);
  await new Promise((resolve) => setTimeout(resolve, 300));
  leaving.abort();
  await first;
  await untilStatus(threadId, run.run_id, "interrupted");
});

// The requests of the React hook, with its options: a new thread, a resumable stream, the history
// after it, a second run from the newest checkpoint, joining after a reload, and stop.
test("useStream's transport calls", async () => {
  const threadId = await newThread();
  const question = { messages: [{ type: "human", content: "hi" }] };
  const submitted = await all(
    client.runs.stream(threadId, "speaker", {
      input: question,
      streamMode: ["values", "messages-tuple"],
      streamSubgraphs: true,
      streamResumable: true,
      onDisconnect: "continue",
    }),
  );
  const tuples = submitted.filter((part) => part.event === "messages");
  assert.ok(tuples.length >= 3);
  assert.equal(tuples[0].data[0].type, "AIMessageChunk");
  const history = await client.threads.getHistory(threadId, { limit: 10 });
  assert.equal(history.length, 3);
  assert.deepEqual((await client.threads.getState(threadId)).values, history[0].values);

  const { thread_id: _, ...checkpoint } = history[0].checkpoint;
  const again = await all(
    client.runs.stream(threadId, "speaker", {
      input: question,
      checkpoint,
      streamMode: ["values"],
    }),
  );
  assert.equal(again.at(-1).data.messages.length, 4);

  const long = await client.runs.create(threadId, "steps", {
    input: { seconds: 30 },
    streamResumable: true,
  });
  const rejoined = client.runs.joinStream(threadId, long.run_id, { lastEventId: "-1" });
  assert.equal((await rejoined.next()).value.event, "metadata");
  await client.runs.cancel(threadId, long.run_id);
  await all(rejoined);
  await untilStatus(threadId, long.run_id, "interrupted");
});

test("a thread is followed from run to run", async () => {
  const threadId = await newThread();
  const leaving = new AbortController();
  const followed = client.threads.joinStream(threadId, {
    streamMode: ["lifecycle"],
    lastEventId: "-",
    signal: leaving.signal,
  });
  const run = await client.runs.create(threadId, "counter", {
    input: { count: 1 },
    streamResumable: true,
  });
  assert.deepEqual((await followed.next()).value.data, { run_id: run.run_id, attempt: 1 });
  const done = (await followed.next()).value.data;
  assert.deepEqual(done, { status: "run_done", run_id: run.run_id });
  leaving.abort();
});
