// Clients of other makers, in a document of jsdom: AG-UI, CopilotKit's protocol, and assistant-ui
// (`make test-js`).

import "../dom.mjs";
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { after, afterEach, describe, test } from "node:test";
import { LangGraphAgent } from "@ag-ui/langgraph";
import { AssistantRuntimeProvider } from "@assistant-ui/react";
import { unstable_createLangGraphStream, useLangGraphRuntime } from "@assistant-ui/react-langgraph";
import { Client } from "@langchain/langgraph-sdk";
import { cleanup, render } from "@testing-library/react";
import { createElement } from "react";
import { apiUrl, assertNothingRuns, endless, eventually, pause } from "../agent.mjs";

const client = new Client({ apiUrl });

describe("AG-UI", { concurrency: false }, () => {
  function newAgent(threadId = randomUUID()) {
    return new LangGraphAgent({ deploymentUrl: apiUrl, graphId: "agent", threadId });
  }

  function ask(agent, content, events = []) {
    agent.addMessage({ id: randomUUID(), role: "user", content });
    return agent.runAgent({}, { onEvent: ({ event }) => void events.push(event) });
  }

  function answers(agent) {
    return agent.messages.filter((one) => one.role === "assistant").map((one) => one.content.trim());
  }

  function saidIn(events) {
    return events.filter((event) => event.type === "TEXT_MESSAGE_CONTENT").map((event) => event.delta);
  }

  test("a question is answered word by word", async () => {
    const agent = newAgent();
    const events = [];
    await ask(agent, "say 12", events);
    assert.equal(saidIn(events).join("").trim().split(" ").length, 12);
    assert.ok(saidIn(events).length > 2);
    await ask(agent, "hello");
    assert.deepEqual(agent.messages.map((one) => one.role), ["user", "assistant", "user", "assistant"]);
  });

  test("a tool is called, and its call is shown", async () => {
    const agent = newAgent();
    const events = [];
    await ask(agent, 'call add {"a": 2, "b": 3}', events);
    const types = events.map((event) => event.type);
    for (const type of ["TOOL_CALL_START", "TOOL_CALL_END", "RUN_FINISHED"]) {
      assert.ok(types.includes(type), `${type} in ${types}`);
    }
    assert.ok(answers(agent).includes("result: 5"), String(answers(agent)));
  });

  test("an interrupt is shown and answered", async () => {
    const agent = newAgent();
    const events = [];
    await ask(agent, 'call ask {"question": "how many?"}', events);
    const shown = events.find((event) => event.name === "on_interrupt");
    assert.deepEqual(JSON.parse(shown.value), { question: "how many?" });
    await agent.runAgent({ forwardedProps: { command: { resume: "seven" } } });
    assert.ok(answers(agent).includes("result: the user says seven"), String(answers(agent)));
  });

  // A stop before the first event names an id that no run has, and no other cancel follows.
  for (const moment of ["as soon as the run is known", "in the middle of its answer"]) {
    test(`a stop ${moment} leaves nothing that runs`, async () => {
      const { thread_id: threadId } = await client.threads.create();
      const text = endless();
      const agent = newAgent(threadId);
      agent.addMessage({ id: randomUUID(), role: "user", content: text });
      const onEvent = ({ event }) => {
        const isKnown = event.type === "RAW" && agent.activeRun?.serverRunIdKnown;
        const isAnswer = event.type === "TEXT_MESSAGE_CONTENT";
        if (moment.startsWith("as") ? isKnown : isAnswer) agent.abortRun();
      };
      await agent.runAgent({}, { onEvent }).catch((error) => {
        // The agent says that the run is finished before it has ended the message.
        assert.match(error.message, /RUN_FINISHED.*still active/);
      });
      assert.ok((await assertNothingRuns(threadId, text)).includes("interrupted"));
    });
  }
});

describe("assistant-ui", { concurrency: false }, () => {
  afterEach(cleanup);

  function chat(threadId) {
    let runtime;
    function Chat() {
      runtime = useLangGraphRuntime({
        stream: unstable_createLangGraphStream({ client, assistantId: "agent" }),
        unstable_allowCancellation: true,
        create: async () => ({ externalId: threadId }),
        load: async (externalId) => {
          const state = await client.threads.getState(externalId);
          return { messages: state.values.messages ?? [], interrupts: state.tasks[0]?.interrupts };
        },
      });
      return createElement(AssistantRuntimeProvider, { runtime });
    }
    render(createElement(Chat));
    return {
      say: (text) => runtime.thread.append({ role: "user", content: [{ type: "text", text }] }),
      stop: () => runtime.thread.cancelRun(),
      texts: () =>
        runtime.thread.getState().messages.map((one) =>
          one.content.map((part) => part.text ?? "").join("").trim(),
        ),
    };
  }

  test("a question is answered, and the next one", async () => {
    const { thread_id: threadId } = await client.threads.create();
    const page = chat(threadId);
    page.say("say 5");
    await eventually(() => assert.deepEqual(page.texts(), ["say 5", "word0 word1 word2 word3 word4"]));
    page.say("hello");
    await eventually(() => assert.deepEqual(page.texts().slice(2), ["hello", "ok"]));
  });

  for (const ms of [0, 50, 500]) {
    test(`a stop ${ms} ms after the start leaves nothing that runs`, async () => {
      const { thread_id: threadId } = await client.threads.create();
      const text = endless();
      const page = chat(threadId);
      page.say(text);
      await pause(ms);
      page.stop();
      await assertNothingRuns(threadId, text);
    });
  }
});

after(() => setTimeout(() => process.exit(process.exitCode), 0));
