// React's `useStream`, in both of its forms, in a document of jsdom (`make test-js`).

import "./dom.mjs";
import assert from "node:assert/strict";
import { after, afterEach, describe, test } from "node:test";
import { useStream as useRunStream } from "@langchain/langgraph-sdk/react";
import { useStream as useThreadStream } from "@langchain/react";
import { cleanup, renderHook } from "@testing-library/react";
import {
  apiUrl,
  assertNothingRuns,
  client,
  endless,
  eventually,
  modelCalls,
  pause,
  statuses,
} from "./agent.mjs";

function human(content) {
  return { messages: [{ type: "human", content }] };
}

function textOf(message) {
  const { content } = message;
  return typeof content === "string" ? content : content.map((block) => block.text ?? "").join("");
}

function texts(hook) {
  return hook.result.current.messages.map((message) => textOf(message).trim());
}

afterEach(cleanup);

const FORMS = {
  "@langchain/langgraph-sdk/react": {
    use: (options) =>
      renderHook(() => useRunStream({ apiUrl, assistantId: "agent", fetchStateHistory: true, ...options })),
    resume: (stream, resume) => stream.submit(undefined, { command: { resume } }),
    fork: (stream, checkpoint, values) => stream.submit(values, { checkpoint }),
    withModel: (model) => ({ context: { model } }),
    reload: { reconnectOnMount: true },
    stops: [0, 50, 500],
  },
  "@langchain/react": {
    use: (options) =>
      renderHook(() => useThreadStream({ apiUrl, assistantId: "agent", ...options })),
    resume: (stream, resume) => stream.respond(resume),
    fork: (stream, checkpoint, values) =>
      stream.submit(values, { forkFrom: checkpoint.checkpoint_id }),
    withModel: (model) => ({ config: { configurable: { model } } }),
    reload: {},
    stops: [], // it sends no cancel before it has the run's id
  },
};

for (const [name, form] of Object.entries(FORMS)) {
  describe(name, { concurrency: false }, () => {
    test("a question is answered, word by word, and the next one too", async () => {
      let threadId;
      const hook = form.use({ onThreadId: (id) => (threadId = id) });
      const seen = new Set();
      void hook.result.current.submit(human("say 30"));
      await eventually(() => {
        const count = (texts(hook)[1] ?? "").split(" ").filter(Boolean).length;
        if (count) seen.add(count);
        assert.equal(count, 30);
      });
      assert.ok(seen.size > 2, `the answer came in ${seen.size} parts`);
      await eventually(() => assert.equal(hook.result.current.isLoading, false));
      void hook.result.current.submit(human("hello"));
      await eventually(() => assert.deepEqual(texts(hook).slice(2), ["hello", "ok"]));
      await eventually(async () => assert.deepEqual(await statuses(threadId), ["success", "success"]));
      const state = await client.threads.getState(threadId);
      assert.equal(state.values.messages.length, 4);
    });

    test("stop stops the run on the server and the call of its model", async () => {
      let threadId;
      const text = endless();
      const hook = form.use({ onThreadId: (id) => (threadId = id) });
      void hook.result.current.submit(human(text));
      await eventually(() => assert.match(texts(hook)[1] ?? "", /word0/));
      await hook.result.current.stop();
      await eventually(async () => assert.deepEqual(await statuses(threadId), ["interrupted"]));
      await eventually(async () => {
        const calls = await modelCalls(text);
        assert.deepEqual(calls.map((call) => call.was_closed_early), [true]);
      });
      await eventually(() => assert.equal(hook.result.current.isLoading, false));
      void hook.result.current.submit(human("after the stop"));
      // `@langchain/react` shows the half of the stopped answer as the last message, for as long
      // as the page lives.
      await eventually(() => {
        const next = texts(hook).indexOf("after the stop") + 1;
        assert.ok(next > 0);
        assert.equal(texts(hook)[next], "ok");
      });
    });

    for (const ms of form.stops) {
      test(`a stop ${ms} ms after the start leaves nothing that runs`, async () => {
        const { thread_id: threadId } = await client.threads.create();
        const text = endless();
        const hook = form.use({ threadId });
        await eventually(() => assert.equal(hook.result.current.isThreadLoading, false));
        void hook.result.current.submit(human(text));
        await pause(ms);
        await hook.result.current.stop();
        await assertNothingRuns(threadId, text);
      });
    }

    test("a stop as soon as the run is known leaves nothing that runs", async () => {
      const { thread_id: threadId } = await client.threads.create();
      const text = endless();
      const stopped = new Promise((resolve) => {
        const hook = form.use({
          threadId,
          onCreated: () => setTimeout(() => resolve(hook.result.current.stop()), 0),
        });
        void hook.result.current.submit(human(text));
      });
      await stopped;
      await assertNothingRuns(threadId, text);
    });

    test("an interrupt is shown and answered", async () => {
      const hook = form.use({});
      void hook.result.current.submit(human('call ask {"question": "how many?"}'));
      await eventually(() =>
        assert.deepEqual(hook.result.current.interrupt?.value, { question: "how many?" }),
      );
      await form.resume(hook.result.current, "seven");
      await eventually(() => assert.equal(texts(hook).at(-1), "result: the user says seven"));
      await eventually(() => assert.equal(hook.result.current.interrupt, undefined));
    });

    test("a message is edited: the thread has a second branch", async () => {
      let threadId;
      const hook = form.use({ onThreadId: (id) => (threadId = id) });
      void hook.result.current.submit(human("first"));
      await eventually(() => assert.deepEqual(texts(hook), ["first", "ok"]));
      const history = await client.threads.getHistory(threadId);
      const before = history.find((state) => state.next[0] === "__start__").checkpoint;
      await form.fork(hook.result.current, before, human("say 2"));
      await eventually(() => assert.deepEqual(texts(hook), ["say 2", "word0 word1"]));
      await eventually(async () => {
        const { values } = await client.threads.getState(threadId);
        assert.deepEqual(values.messages.map((one) => textOf(one).trim()), ["say 2", "word0 word1"]);
      });
    });

    test("a page that is loaded again goes on with the run of the first", async () => {
      let threadId;
      const first = form.use({ ...form.reload, onThreadId: (id) => (threadId = id) });
      void first.result.current.submit(human("say 200"));
      await eventually(() => assert.match(texts(first)[1] ?? "", /word0/));
      first.unmount();
      const second = form.use({ ...form.reload, threadId });
      await eventually(() => assert.match(texts(second).at(-1), /word199$/));
      await eventually(async () => assert.deepEqual(await statuses(threadId), ["success"]));
    });

    test("an error of the graph is shown", async () => {
      const hook = form.use({ assistantId: "agent" });
      void hook.result.current.submit(human("hi"), form.withModel("nobody:none"));
      await eventually(() => assert.match(String(hook.result.current.error), /nobody/));
      await eventually(() => assert.equal(hook.result.current.isLoading, false));
    });
  });
}

test("fifty chats at once, every second one stopped, all answer again", async () => {
  const chats = Array.from({ length: 50 }, (_, number) => number);
  const form = FORMS["@langchain/langgraph-sdk/react"];
  await Promise.all(
    chats.map(async (number) => {
      let threadId;
      const hook = form.use({ onThreadId: (id) => (threadId = id) });
      const stops = number % 2 === 0;
      void hook.result.current.submit(human(stops ? endless() : "say 3"));
      await eventually(() => assert.match(texts(hook)[1] ?? "", stops ? /word0/ : /word2/));
      if (stops) await hook.result.current.stop();
      await eventually(() => assert.equal(hook.result.current.isLoading, false));
      void hook.result.current.submit(human("again"));
      await eventually(() => assert.deepEqual(texts(hook).slice(-2), ["again", "ok"]));
      const expected = ["success", stops ? "interrupted" : "success"];
      await eventually(async () => assert.deepEqual(await statuses(threadId), expected));
    }),
  );
});

after(() => setTimeout(() => process.exit(process.exitCode), 0));
