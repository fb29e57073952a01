// Exa's own JavaScript client against a live server at BELAY_URL (`make test-js` starts one).

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { test } from "node:test";
import Exa from "exa-js";

const betas = ["agent-2026-05-07"];
const poll = { pollInterval: 20, betas };
const LINE_SEPARATOR = "one\u2028two\u0085three";

// Each key is a team, so each test has its own team.
function newClient() {
  return new Exa(`key-${randomUUID()}`, process.env.BELAY_URL);
}

function newRuns() {
  return newClient().beta.agent.runs;
}

// Return a request whose input controls what the test graph does.
function asking(told) {
  return { query: "q", input: { data: [told] }, betas };
}

async function all(stream) {
  const found = [];
  for await (const item of stream) found.push(item);
  return found;
}

function refused(statusCode, code) {
  return (error) => {
    assert.deepEqual([error.statusCode, error.code], [statusCode, code]);
    assert.ok(error.message);
    return true;
  };
}

async function untilRunning(runs, id) {
  for (let left = 2000; left > 0; left -= 1) {
    if ((await runs.get(id, { betas })).status === "running") return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  assert.fail(`${id} never ran`);
}

test("a run is created, polled, read and deleted", async () => {
  const runs = newRuns();
  const run = await runs.create({ query: "hello", metadata: { ticket: "T-1" }, betas });
  assert.match(run.id, /^agent_run_[0-9a-hjkmnp-tv-z]{26}$/);
  assert.deepEqual([run.object, run.status, run.stopReason], ["agent_run", "queued", null]);
  const done = await runs.pollUntilFinished(run.id, poll);
  assert.deepEqual([done.status, done.stopReason], ["completed", "schema_satisfied"]);
  assert.equal(done.output.text, "done: hello");
  assert.deepEqual(done.request, { query: "hello", effort: "auto", metadata: { ticket: "T-1" } });
  assert.deepEqual(await runs.get(run.id, { betas }), done);
  const deleted = { id: run.id, object: "agent_run.deleted", deleted: true };
  assert.deepEqual(await runs.delete(run.id, { betas }), deleted);
  await assert.rejects(runs.get(run.id, { betas }), refused(404, "RUN_NOT_FOUND"));
  await assert.rejects(runs.delete(run.id, { betas }), refused(404, "RUN_NOT_FOUND"));
});

test("what the graph found comes in the shape that was asked for", async () => {
  const runs = newRuns();
  const outputSchema = { type: "object", properties: { n: { type: "integer" } }, required: ["n"] };
  const done = await runs.createAndWait(
    { ...asking({ structured: { n: 5 } }), outputSchema },
    poll,
  );
  assert.deepEqual(done.output.structured, { n: 5 });
  await assert.rejects(
    runs.createAndWait({ ...asking({ structured: { n: "x" } }), outputSchema }, poll),
    (error) => {
      assert.equal(error.run.status, "failed");
      assert.equal(error.run.error.path, "structured.n");
      assert.equal(error.message, error.run.error.message);
      return true;
    },
  );
  await assert.rejects(
    runs.create({ query: "q", outputSchema: { type: "objct" }, betas }),
    refused(400, "INVALID_OUTPUT_SCHEMA"),
  );
});

test("a run that fails is thrown with its words", async () => {
  await assert.rejects(newRuns().createAndWait(asking({ fail: "no luck" }), poll), /no luck/);
});

test("a stream has three events, whatever lines its text has", async () => {
  const runs = newRuns();
  const events = await all(await runs.create({ ...asking({ text: LINE_SEPARATOR }), stream: true }));
  const names = ["agent_run.created", "agent_run.started", "agent_run.completed"];
  assert.deepEqual(events.map((event) => event.event), names);
  assert.deepEqual(events.map((event) => event.id), ["1", "2", "3"]);
  assert.equal(events[2].data.output.text, LINE_SEPARATOR);
  const listed = await runs.events.list(events[0].data.id, { betas });
  assert.deepEqual(listed.data.map((event) => event.data), events.map((event) => event.data));
});

test("a stream that beats while its run works is read as without beats", async () => {
  const runs = newRuns();
  const events = await all(await runs.create({ ...asking({ seconds: 2.5 }), stream: true }));
  assert.deepEqual(events.map((event) => event.id), ["1", "2", "3"]);
  assert.equal(events[2].event, "agent_run.completed");
});

test("a run is cancelled and another one stopped", async () => {
  const runs = newRuns();
  const told = asking({ seconds: 60, first_text: "so far" });
  const run = await runs.create(told);
  await untilRunning(runs, run.id);
  const cancelled = await runs.cancel(run.id, { betas });
  assert.deepEqual([cancelled.status, cancelled.stopReason], ["cancelled", "cancelled"]);
  assert.deepEqual(await runs.cancel(run.id, { betas }), cancelled);
  const other = await runs.create(told);
  await untilRunning(runs, other.id);
  const stopped = await runs.stop(other.id, { betas });
  assert.deepEqual([stopped.status, stopped.stopReason], ["completed", "stopped"]);
});

test("all runs are listed, newest first", async () => {
  const runs = newRuns();
  const made = [];
  for (let n = 0; n < 5; n += 1) made.unshift((await runs.create({ query: "q", betas })).id);
  const listed = await all(runs.listAll({ limit: 2, betas }));
  assert.deepEqual(listed.map((run) => run.id), made);
  assert.deepEqual((await runs.getAll({ betas })).map((run) => run.id), made);
});

test("without a key or the beta header nothing is answered", async () => {
  const exa = newClient();
  await assert.rejects(exa.agent.runs.list(), refused(400, "MISSING_BETA_HEADER"));
  await assert.rejects(exa.beta.agent.runs.list({ betas: ["x"] }), refused(400, "INVALID_BETA_HEADER"));
  const nobody = new Exa(" ", process.env.BELAY_URL).beta.agent.runs;
  await assert.rejects(nobody.list({ betas }), refused(401, "TEAM_NOT_FOUND"));
});
