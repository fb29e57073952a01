// Every method of the JavaScript SDK's clients, at least once. `CASES` has an entry for each. A test
// reads the clients' prototypes and fails if an entry is missing or names no method.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { test } from "node:test";
import { Client } from "@langchain/langgraph-sdk";

const client = new Client({ apiUrl: process.env.BELAY_URL });
const PARTS = ["assistants", "threads", "runs", "crons", "store"];
const NEVER_SOON = "0 0 1 1 *";
const WEBHOOK = "https://example.com/hook";

const tag = () => ({ tag: randomUUID() });

async function all(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

async function until(condition, what) {
  for (let left = 1500; left > 0; left -= 1) {
    if (await condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  assert.fail(`never: ${what}`);
}

async function newThread(options) {
  return (await client.threads.create(options)).thread_id;
}

// Create a thread on which `counter` was run from each of these counts.
async function counted(...counts) {
  const threadId = await newThread();
  for (const count of counts) await client.runs.wait(threadId, "counter", { input: { count } });
  return threadId;
}

async function running() {
  const threadId = await newThread();
  const run = await client.runs.create(threadId, "steps", { input: { seconds: 30 } });
  await until(
    async () => (await client.runs.get(threadId, run.run_id)).status === "running",
    "the run to start",
  );
  return run;
}

const CASES = {
  "assistants.get": async () => {
    const made = await client.assistants.create({ graphId: "counter" });
    assert.deepEqual(await client.assistants.get(made.assistant_id), made);
  },
  "assistants.create": async () => {
    const assistantId = randomUUID();
    const wanted = { name: "threes", description: "by three", metadata: tag() };
    const config = { configurable: { by: 3 } };
    const asked = { graphId: "counter", assistantId, config, ...wanted };
    const made = await client.assistants.create(asked);
    for (const [name, value] of Object.entries(wanted)) assert.deepEqual(made[name], value);
    assert.deepEqual(await client.runs.wait(null, assistantId, { input: { count: 1 } }), {
      count: 4,
    });
    await assert.rejects(client.assistants.create({ ...asked, ifExists: "raise" }), /409/);
    assert.deepEqual(await client.assistants.create({ ...asked, ifExists: "do_nothing" }), made);
    const speaker = await client.assistants.create({
      graphId: "teller",
      context: { voice: "loud" },
    });
    const told = await client.runs.wait(null, speaker.assistant_id, { input: { topic: "tea" } });
    assert.deepEqual(told, { told: "loud tea" });
  },
  "assistants.update": async () => {
    const made = await client.assistants.create({ graphId: "counter", metadata: { a: 1 } });
    const changed = await client.assistants.update(made.assistant_id, {
      graphId: "made",
      config: { configurable: { by: 7 } },
      metadata: { b: 2 },
      name: "sevens",
      description: "by seven",
    });
    assert.deepEqual(
      [changed.graph_id, changed.name, changed.description, changed.version],
      ["made", "sevens", "by seven", 2],
    );
    assert.equal(changed.metadata.a + changed.metadata.b, 3);
    const answer = await client.runs.wait(null, made.assistant_id, { input: { count: 1 } });
    assert.deepEqual(answer, { count: 8 });
  },
  "assistants.delete": async () => {
    for (const deleteThreads of [false, true]) {
      const { assistant_id: id } = await client.assistants.create({ graphId: "counter" });
      const threadId = await newThread();
      await client.runs.wait(threadId, id, { input: { count: 1 } });
      await client.assistants.delete(id, { deleteThreads });
      await assert.rejects(client.assistants.get(id), /404/);
      const left = await client.threads.search({ ids: [threadId] });
      assert.equal(left.length, deleteThreads ? 0 : 1);
    }
  },
  "assistants.getGraph": async () => {
    const plain = await client.assistants.getGraph("family");
    assert.ok(plain.nodes.some((node) => node.id === "child"));
    const deep = await client.assistants.getGraph("family", { xray: 1 });
    assert.ok(deep.nodes.some((node) => node.id === "child:child_one"));
  },
  "assistants.getSchemas": async () => {
    const schemas = await client.assistants.getSchemas("counter");
    assert.deepEqual(Object.keys(schemas.input_schema.properties).sort(), ["by", "count", "note"]);
  },
  "assistants.getSubgraphs": async () => {
    const top = await client.assistants.getSubgraphs("onion");
    const whole = await client.assistants.getSubgraphs("onion", { recurse: true });
    assert.ok(Object.keys(whole).length > Object.keys(top).length);
    const [namespace] = Object.keys(top);
    const one = await client.assistants.getSubgraphs("onion", { namespace });
    assert.deepEqual(one, { [namespace]: top[namespace] });
  },
  "assistants.search": async () => {
    const metadata = tag();
    const first = await client.assistants.create({ graphId: "counter", metadata, name: "b" });
    const second = await client.assistants.create({ graphId: "steps", metadata, name: "a" });
    const ids = async (query) =>
      (await client.assistants.search({ metadata, ...query })).map((found) => found.assistant_id);
    const byName = { sortBy: "name", sortOrder: "asc" };
    assert.deepEqual(await ids(byName), [second.assistant_id, first.assistant_id]);
    assert.deepEqual(await ids({ ...byName, limit: 1, offset: 1 }), [first.assistant_id]);
    assert.deepEqual(await ids({ graphId: "steps" }), [second.assistant_id]);
    assert.deepEqual(await ids({ name: "b" }), [first.assistant_id]);
    const chosen = await client.assistants.search({ metadata, name: "b", select: ["name"] });
    assert.deepEqual(chosen, [{ name: "b" }]);
    const page = await client.assistants.search({ metadata, limit: 1, includePagination: true });
    assert.deepEqual([page.assistants.length, page.next], [1, "1"]);
  },
  "assistants.count": async () => {
    const metadata = tag();
    await client.assistants.create({ graphId: "counter", metadata, name: "b" });
    await client.assistants.create({ graphId: "steps", metadata, name: "a" });
    assert.equal(await client.assistants.count({ metadata }), 2);
    assert.equal(await client.assistants.count({ metadata, graphId: "steps" }), 1);
    assert.equal(await client.assistants.count({ metadata, name: "b" }), 1);
  },
  "assistants.getVersions": async () => {
    const { assistant_id: id } = await client.assistants.create({ graphId: "counter" });
    for (const n of [2, 3]) await client.assistants.update(id, { metadata: { n } });
    const versions = async (which) =>
      (await client.assistants.getVersions(id, which)).map((found) => found.version);
    assert.deepEqual(await versions(), [3, 2, 1]);
    assert.deepEqual(await versions({ metadata: { n: 2 } }), [2]);
    assert.deepEqual(await versions({ limit: 1, offset: 1 }), [2]);
  },
  "assistants.setLatest": async () => {
    const { assistant_id: id } = await client.assistants.create({ graphId: "counter", name: "1" });
    await client.assistants.update(id, { name: "2" });
    assert.equal((await client.assistants.setLatest(id, 1)).name, "1");
    assert.equal((await client.assistants.get(id)).name, "1");
  },

  "threads.get": async () => {
    const made = await client.threads.create();
    assert.deepEqual(await client.threads.get(made.thread_id), made);
  },
  "threads.create": async () => {
    const [threadId, metadata] = [randomUUID(), tag()];
    const supersteps = [
      { updates: [{ values: { count: 1 }, asNode: "__input__" }] },
      { updates: [{ values: { count: 5 }, asNode: "inc" }] },
    ];
    const asked = { threadId, metadata, graphId: "counter", supersteps, ttl: 30 };
    const made = await client.threads.create(asked);
    assert.deepEqual(made.metadata, { ...metadata, graph_id: "counter" });
    assert.deepEqual((await client.threads.getState(threadId)).values, { count: 5 });
    await assert.rejects(client.threads.create({ threadId, ifExists: "raise" }), /409/);
    const again = await client.threads.create({ threadId, ifExists: "do_nothing" });
    assert.equal(again.created_at, made.created_at);
  },
  "threads.copy": async () => {
    const threadId = await counted(1);
    const copy = await client.threads.copy(threadId);
    assert.notEqual(copy.thread_id, threadId);
    assert.deepEqual((await client.threads.getState(copy.thread_id)).values, { count: 2 });
  },
  "threads.update": async () => {
    const threadId = await newThread({ metadata: { a: 1 } });
    const changed = await client.threads.update(threadId, { metadata: { b: 2 }, ttl: 5 });
    assert.deepEqual(changed.metadata, { a: 1, b: 2 });
  },
  "threads.delete": async () => {
    const threadId = await newThread();
    await client.threads.delete(threadId);
    await assert.rejects(client.threads.get(threadId), /404/);
  },
  "threads.search": async () => {
    const metadata = tag();
    const first = await newThread({ metadata });
    const second = await newThread({ metadata });
    await client.runs.wait(second, "counter", { input: { count: 1 }, interruptBefore: ["inc"] });
    const ids = async (query) =>
      (await client.threads.search({ metadata, ...query })).map((found) => found.thread_id);
    const byAge = { sortBy: "created_at", sortOrder: "asc" };
    assert.deepEqual(await ids(byAge), [first, second]);
    assert.deepEqual(await ids({ ...byAge, limit: 1, offset: 1 }), [second]);
    assert.deepEqual(await ids({ status: "interrupted" }), [second]);
    assert.deepEqual(await ids({ values: { count: 1 } }), [second]);
    assert.deepEqual(await ids({ ids: [first] }), [first]);
    const chosen = await client.threads.search({ ids: [first], select: ["status"] });
    assert.deepEqual(chosen, [{ status: "idle" }]);
  },
  "threads.count": async () => {
    const metadata = tag();
    await newThread({ metadata });
    const asked = await newThread({ metadata });
    await client.runs.wait(asked, "counter", { input: { count: 1 }, interruptBefore: ["inc"] });
    assert.equal(await client.threads.count({ metadata }), 2);
    assert.equal(await client.threads.count({ metadata, status: "interrupted" }), 1);
    assert.equal(await client.threads.count({ metadata, values: { count: 1 } }), 1);
  },
  "threads.getState": async () => {
    const threadId = await counted(1, 5);
    const then = (await client.threads.getHistory(threadId))[3];
    assert.deepEqual((await client.threads.getState(threadId)).values, { count: 6 });
    assert.deepEqual(await client.threads.getState(threadId, then.checkpoint), then);
    assert.deepEqual(await client.threads.getState(threadId, then.checkpoint_id), then);
    const family = await newThread();
    await client.runs.wait(family, "family", { input: { ask: true } });
    const state = await client.threads.getState(family, undefined, { subgraphs: true });
    assert.deepEqual(state.tasks[0].state.next, ["child_two"]);
  },
  "threads.updateState": async () => {
    const threadId = await newThread();
    await client.runs.wait(threadId, "steps", { input: {}, interruptAfter: ["s1"] });
    const { checkpoint, checkpoint_id: checkpointId } = await client.threads.getState(threadId);
    await client.threads.updateState(threadId, { values: { tag: "x" }, asNode: "s3" });
    assert.deepEqual((await client.threads.getState(threadId)).next, ["s4"]);
    for (const where of [{ checkpoint }, { checkpointId }]) {
      await client.threads.updateState(threadId, { values: { tag: "y" }, ...where });
      assert.deepEqual((await client.threads.getState(threadId)).next, ["s2"]);
    }
  },
  "threads.patchState": async () => {
    const threadId = await newThread({ metadata: { a: 1 } });
    await client.threads.patchState(threadId, { b: 2 });
    await client.threads.patchState({ configurable: { thread_id: threadId } }, { c: 3 });
    assert.deepEqual((await client.threads.get(threadId)).metadata, { a: 1, b: 2, c: 3 });
  },
  "threads.getHistory": async () => {
    const threadId = await counted(1, 5);
    const whole = await client.threads.getHistory(threadId);
    assert.deepEqual(await client.threads.getHistory(threadId, { limit: 2 }), whole.slice(0, 2));
    const before = { configurable: { checkpoint_id: whole[1].checkpoint_id } };
    assert.deepEqual(await client.threads.getHistory(threadId, { before }), whole.slice(2));
    const first = await client.threads.getHistory(threadId, { metadata: { step: -1 } });
    assert.deepEqual(first, whole.filter((state) => state.metadata.step === -1));
    await client.runs.wait(threadId, "family", { input: {} });
    const checkpoint = { checkpoint_ns: "child" };
    const ofChild = await client.threads.getHistory(threadId, { checkpoint });
    assert.ok(ofChild.length > 0);
    for (const state of ofChild) assert.equal(state.checkpoint.checkpoint_ns, "child");
  },
  "threads.joinStream": async () => {
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
    assert.equal((await followed.next()).value.data.run_id, run.run_id);
    leaving.abort();
  },

  "runs.stream": async () => {
    const threadId = await newThread();
    const told = [];
    const parts = await all(
      client.runs.stream(threadId, "family", {
        input: {},
        metadata: tag(),
        streamMode: ["updates", "values"],
        streamSubgraphs: true,
        streamResumable: true,
        feedbackKeys: ["liked"],
        onRunCreated: (run) => told.push(run),
      }),
    );
    assert.equal(parts[0].data.run_id, told[0].run_id);
    assert.ok(parts.some((part) => part.event.startsWith("updates|child")));
    assert.ok(parts.every((part) => part.id !== undefined));
    const [run] = await client.runs.list(threadId);
    assert.deepEqual(run.kwargs.feedback_keys, ["liked"]);
  },
  "runs.create": async () => {
    const [threadId, metadata] = [randomUUID(), tag()];
    const run = await client.runs.create(threadId, "counter", {
      input: { count: 1 },
      config: { configurable: { by: 5 } },
      metadata,
      streamMode: ["updates"],
      ifNotExists: "create",
      multitaskStrategy: "reject",
      durability: "exit",
      afterSeconds: 0.2,
      webhook: WEBHOOK,
    });
    assert.equal(run.status, "pending");
    assert.equal(run.metadata.tag, metadata.tag);
    assert.equal(run.multitask_strategy, "reject");
    assert.deepEqual(await client.runs.join(threadId, run.run_id), { count: 6 });
    assert.equal((await client.threads.getHistory(threadId)).length, 1);
  },
  "runs.createBatch": async () => {
    const made = await client.runs.createBatch(
      [1, 5].map((count) => ({ assistantId: "counter", input: { count } })),
    );
    const answers = await Promise.all(
      made.map((run) => client.runs.join(run.thread_id, run.run_id)),
    );
    assert.deepEqual(answers, [{ count: 2 }, { count: 6 }]);
  },
  "runs.wait": async () => {
    const answer = await client.runs.wait(null, "bad", { input: {}, raiseError: false });
    assert.equal(answer.__error__.error, "ValueError");
    await assert.rejects(client.runs.wait(null, "bad", { input: {} }), /boom from bad node/);
    const threadId = await newThread();
    await client.runs.wait(threadId, "questions", { input: { topic: "tea" } });
    const again = await client.runs.wait(threadId, "questions", { command: { resume: "one" } });
    assert.equal(again.__interrupt__[0].value.question, "second about tea?");
    const spoken = { input: { topic: "tea" }, context: { voice: "loud" } };
    assert.deepEqual(await client.runs.wait(null, "teller", spoken), { told: "loud tea" });
    const forked = await counted(1);
    const { checkpoint, checkpoint_id: checkpointId } = await client.threads.getState(forked);
    await client.runs.wait(forked, "counter", { input: { count: 10 } });
    for (const where of [{ checkpoint }, { checkpointId }]) {
      const from = await client.runs.wait(forked, "counter", { input: { note: "x" }, ...where });
      assert.deepEqual(from, { count: 3, note: "x" });
    }
  },
  "runs.list": async () => {
    const threadId = await counted(1, 2, 3);
    const ids = async (which) =>
      (await client.runs.list(threadId, which)).map((run) => run.run_id);
    const whole = await ids();
    assert.equal(whole.length, 3);
    assert.deepEqual(await ids({ limit: 1, offset: 1 }), whole.slice(1, 2));
    assert.deepEqual(await ids({ status: "error" }), []);
    const chosen = await client.runs.list(threadId, { limit: 1, select: ["status"] });
    assert.deepEqual(chosen, [{ status: "success" }]);
  },
  "runs.get": async () => {
    const threadId = await counted(1);
    const [run] = await client.runs.list(threadId);
    assert.deepEqual(await client.runs.get(threadId, run.run_id), run);
  },
  "runs.cancel": async () => {
    const { thread_id: threadId, run_id: runId } = await running();
    await client.runs.cancel(threadId, runId, true, "interrupt");
    assert.equal((await client.runs.get(threadId, runId)).status, "interrupted");
  },
  "runs.join": async () => {
    const threadId = await newThread();
    const run = await client.runs.create(threadId, "counter", { input: { count: 1 } });
    assert.deepEqual(await client.runs.join(threadId, run.run_id), { count: 2 });
  },
  "runs.joinStream": async () => {
    const threadId = await newThread();
    const run = await client.runs.create(threadId, "counter", {
      input: { count: 1 },
      streamMode: ["values", "updates"],
      streamResumable: true,
    });
    await client.runs.join(threadId, run.run_id);
    const how = { lastEventId: "-1", streamMode: ["values"] };
    const parts = await all(client.runs.joinStream(threadId, run.run_id, how));
    const values = parts.filter((part) => part.event !== "metadata");
    assert.deepEqual(values.map((part) => part.data), [{ count: 1 }, { count: 2 }]);
  },
  "runs.delete": async () => {
    const { thread_id: threadId, run_id: runId } = await running();
    await client.runs.delete(threadId, runId);
    await assert.rejects(client.runs.get(threadId, runId), /404/);
  },

  "crons.createForThread": async () => {
    const threadId = await newThread();
    const cron = await client.crons.createForThread(threadId, "counter", {
      schedule: NEVER_SOON,
      input: { count: 1 },
      multitaskStrategy: "interrupt",
      enabled: false,
      webhook: WEBHOOK,
    });
    assert.deepEqual([cron.thread_id, cron.enabled], [threadId, false]);
    assert.deepEqual(cron.payload.input, { count: 1 });
    assert.equal(cron.payload.multitask_strategy, "interrupt");
    await client.crons.delete(cron.cron_id);
  },
  "crons.create": async () => {
    const metadata = tag();
    const cron = await client.crons.create("counter", {
      schedule: NEVER_SOON,
      context: { by: 4 },
      metadata,
      interruptBefore: ["inc"],
      onRunCompleted: "keep",
      durability: "sync",
    });
    assert.deepEqual([cron.on_run_completed, cron.metadata], ["keep", metadata]);
    assert.deepEqual(cron.payload.context, { by: 4 });
    assert.deepEqual(cron.payload.interrupt_before, ["inc"]);
    assert.equal(cron.payload.durability, "sync");
    await client.crons.delete(cron.cron_id);
  },
  "crons.update": async () => {
    const cron = await client.crons.create("counter", { schedule: NEVER_SOON });
    const changed = await client.crons.update(cron.cron_id, {
      schedule: "@daily",
      endTime: "2199-01-01T00:00:00Z",
      input: { count: 5 },
      metadata: { b: 2 },
      interruptAfter: ["inc"],
      onRunCompleted: "keep",
      enabled: false,
    });
    assert.deepEqual(
      [changed.schedule, changed.on_run_completed, changed.enabled],
      ["@daily", "keep", false],
    );
    assert.ok(changed.end_time.startsWith("2199-01-01"));
    assert.deepEqual([changed.payload.input, changed.metadata], [{ count: 5 }, { b: 2 }]);
    await client.crons.delete(cron.cron_id);
  },
  "crons.delete": async () => {
    const cron = await client.crons.create("counter", { schedule: NEVER_SOON });
    await client.crons.delete(cron.cron_id);
    await assert.rejects(client.crons.delete(cron.cron_id), /404/);
  },
  "crons.search": async () => {
    const { assistant_id: assistantId } = await client.assistants.create({ graphId: "counter" });
    const how = { schedule: NEVER_SOON };
    const first = await client.crons.create(assistantId, { ...how, enabled: false });
    const second = await client.crons.create(assistantId, how);
    const ids = async (query) =>
      (await client.crons.search({ assistantId, ...query })).map((found) => found.cron_id);
    const byAge = { sortBy: "created_at", sortOrder: "asc" };
    assert.deepEqual(await ids(byAge), [first.cron_id, second.cron_id]);
    assert.deepEqual(await ids({ ...byAge, limit: 1, offset: 1 }), [second.cron_id]);
    assert.deepEqual(await ids({ enabled: false }), [first.cron_id]);
    assert.deepEqual(await ids({ threadId: randomUUID() }), []);
    const chosen = await client.crons.search({ assistantId, limit: 1, select: ["schedule"] });
    assert.deepEqual(chosen, [how]);
    await client.assistants.delete(assistantId);
  },
  "crons.count": async () => {
    const { assistant_id: assistantId } = await client.assistants.create({ graphId: "counter" });
    await client.crons.create(assistantId, { schedule: NEVER_SOON });
    assert.equal(await client.crons.count({ assistantId }), 1);
    assert.equal(await client.crons.count({ threadId: randomUUID() }), 0);
    await client.assistants.delete(assistantId);
  },

  "store.putItem": async () => {
    const root = randomUUID();
    await client.store.putItem([root], "seen", { text: "tea" }, { ttl: 60 });
    await client.store.putItem([root], "hidden", { text: "tea" }, { index: false });
    const { items } = await client.store.searchItems([root], { query: "tea" });
    const scores = Object.fromEntries(items.map((item) => [item.key, item.score]));
    assert.ok(scores.seen > 0.99);
    assert.ok(scores.hidden === undefined || scores.hidden === null);
  },
  "store.getItem": async () => {
    const root = randomUUID();
    await client.store.putItem([root, "a"], "k", { n: 1 });
    const item = await client.store.getItem([root, "a"], "k", { refreshTtl: true });
    assert.deepEqual([item.namespace, item.key, item.value], [[root, "a"], "k", { n: 1 }]);
    assert.equal(await client.store.getItem([root], "none"), null);
  },
  "store.deleteItem": async () => {
    const root = randomUUID();
    await client.store.putItem([root], "k", { n: 1 });
    await client.store.deleteItem([root], "k");
    assert.equal(await client.store.getItem([root], "k"), null);
  },
  "store.searchItems": async () => {
    const root = randomUUID();
    for (const n of [0, 1, 2]) await client.store.putItem([root], `${n}`, { n });
    const keys = async (options) =>
      (await client.store.searchItems([root], options)).items.map((item) => item.key);
    const whole = await keys();
    assert.deepEqual([...whole].sort(), ["0", "1", "2"]);
    assert.deepEqual(await keys({ filter: { n: 1 } }), ["1"]);
    assert.deepEqual(await keys({ limit: 1, offset: 1, refreshTtl: false }), whole.slice(1, 2));
  },
  "store.listNamespaces": async () => {
    const root = randomUUID();
    const paths = [[root, "a", "x"], [root, "a", "y"], [root, "b", "x"]];
    for (const path of paths) await client.store.putItem(path, "k", { n: 1 });
    const listed = async (options) =>
      (await client.store.listNamespaces({ prefix: [root], ...options })).namespaces;
    assert.deepEqual(await listed(), paths);
    assert.deepEqual(await listed({ suffix: ["x"] }), [paths[0], paths[2]]);
    assert.deepEqual(await listed({ maxDepth: 2 }), [[root, "a"], [root, "b"]]);
    assert.deepEqual(await listed({ limit: 1, offset: 1 }), [paths[1]]);
  },
};

test("every method has a case, and every case a method", () => {
  const methods = PARTS.flatMap((part) =>
    Object.getOwnPropertyNames(Object.getPrototypeOf(client[part]))
      .filter((name) => name !== "constructor")
      .map((name) => `${part}.${name}`),
  );
  assert.deepEqual(methods.sort(), Object.keys(CASES).sort());
});

// Each case has to call its method.
for (const [name, run] of Object.entries(CASES))
  test(`${name} works`, async (context) => {
    const [part, method] = name.split(".");
    const called = context.mock.method(client[part], method);
    await run();
    assert.ok(called.mock.callCount() > 0, `${name} was not called`);
  });
