"""Two tenants perform random operations on their own resources and on each other's: neither sees,
changes or stops what belongs to the other."""

from __future__ import annotations

import itertools
import random
import uuid
from typing import Any

import httpx
import pytest

from tests.long_forms import long_case

LATER = {"assistant_id": "counter", "input": {"count": 1}, "after_seconds": 3600}


class Tenant:
    """The resources of one tenant. Each has a mark that no other tenant may ever see."""

    def __init__(self, server, name: str) -> None:
        self.name = name
        self.mark = f"mark-{name}-{uuid.uuid4().hex}"
        headers = {"Authorization": f"Bearer {name}-{uuid.uuid4().hex[:6]}"}
        self.client = httpx.Client(base_url=server.url, timeout=60, headers=headers)
        self.threads: list[str] = []
        self.runs: list[tuple[str, str]] = []
        self.assistants: list[str] = []
        self.crons: list[str] = []

    @property
    def marked(self) -> dict[str, Any]:
        return {"metadata": {"mark": self.mark}}


class Play:
    def __init__(self, server, seed: int) -> None:
        self.chosen = random.Random(seed)
        self.two = [Tenant(server, "ann"), Tenant(server, "bob")]
        self.keys = [f"key-{n}-{seed}" for n in range(3)]
        self.done: list[str] = []

    def one(self, ids: list[Any], default: Any) -> Any:
        return self.chosen.choice(ids) if ids else default

    def step(self) -> None:
        me = self.chosen.choice(self.two)
        other = next(tenant for tenant in self.two if tenant is not me)
        whose = self.chosen.choice((me, me, other))
        act = self.chosen.choice(ACTS)
        answer = act(self, me, whose)
        self.done.append(f"{me.name} {act.__name__} {whose.name} {answer.status_code}")
        assert answer.status_code < 500, self.done[-20:]
        assert other.mark not in answer.text, self.done[-20:]
        if whose is other and act in OF_SOMEBODY:
            assert answer.status_code in (403, 404, 409, 422), self.done[-20:]

    def everything_is_there(self) -> None:
        """Check that what each tenant has created and not deleted is still there."""
        for tenant in self.two:
            for thread in tenant.threads:
                found = tenant.client.get(f"/threads/{thread}")
                assert found.status_code == 200, self.done[-20:]
                assert found.json()["metadata"]["mark"] == tenant.mark, self.done[-20:]
            for thread, run in tenant.runs:
                found = tenant.client.get(f"/threads/{thread}/runs/{run}")
                assert found.json()["status"] in ("pending", "interrupted"), self.done[-20:]


_NOTHING = str(uuid.UUID(int=4 << 76 | 2 << 62))


def make_thread(_play, me, _whose):
    answer = me.client.post("/threads", json=me.marked)
    me.threads.append(answer.json()["thread_id"])
    return answer


def take_thread(play, me, whose):
    """Create a thread with an id that is taken."""
    if not whose.threads:
        return me.client.get(f"/threads/{_NOTHING}")
    thread = play.one(whose.threads, _NOTHING)
    body = {**me.marked, "thread_id": thread, "if_exists": "raise"}
    answer = me.client.post("/threads", json=body)
    if answer.status_code == 200:
        me.client.delete(f"/threads/{thread}")
    return answer


def patch_thread(play, me, whose):
    return me.client.patch(f"/threads/{play.one(whose.threads, _NOTHING)}", json=me.marked)


def read_thread(play, me, whose):
    thread = play.one(whose.threads, _NOTHING)
    what = play.chosen.choice(("", "/state", "/history", "/runs"))
    return me.client.get(f"/threads/{thread}{what}")


def copy_thread(play, me, whose):
    return me.client.post(f"/threads/{play.one(whose.threads, _NOTHING)}/copy", json=me.marked)


def delete_thread(play, me, whose):
    thread = play.one(whose.threads, _NOTHING)
    answer = me.client.delete(f"/threads/{thread}")
    if answer.status_code == 204:
        assert whose is me, play.done[-20:]
        me.threads.remove(thread)
        me.runs = [run for run in me.runs if run[0] != thread]
    return answer


def run_on_thread(play, me, whose):
    thread = play.one(whose.threads, _NOTHING)
    headers = (
        {"Idempotency-Key": play.chosen.choice(play.keys)} if play.chosen.random() < 0.4 else {}
    )
    answer = me.client.post(f"/threads/{thread}/runs", json={**LATER, **me.marked}, headers=headers)
    if answer.status_code == 200:
        assert answer.json()["metadata"]["mark"] == me.mark
        me.runs.append((thread, answer.json()["run_id"]))
    return answer


def run_without_thread(play, me, _whose):
    headers = {"Idempotency-Key": play.chosen.choice(play.keys)}
    body = {**LATER, **me.marked, "on_completion": "keep"}
    return me.client.post("/runs", json=body, headers=headers)


def read_run(play, me, whose):
    thread, run = play.one(whose.runs, (_NOTHING, _NOTHING))
    return me.client.get(f"/threads/{thread}/runs/{run}")


def cancel_run(play, me, whose):
    thread, run = play.one(whose.runs, (_NOTHING, _NOTHING))
    return me.client.post(f"/threads/{thread}/runs/{run}/cancel")


def cancel_many(play, me, whose):
    ids = [run for _, run in whose.runs]
    return me.client.post("/runs/cancel", json={"run_ids": ids or [_NOTHING]})


def make_assistant(_play, me, _whose):
    forged = {"metadata": {"mark": me.mark, "created_by": "system"}}
    answer = me.client.post("/assistants", json={"graph_id": "counter", **forged})
    me.assistants.append(answer.json()["assistant_id"])
    return answer


def use_assistant(play, me, whose):
    named = play.one(whose.assistants, _NOTHING)
    if play.chosen.random() < 0.5:
        return me.client.get(f"/assistants/{named}")
    return me.client.post("/runs/wait", json={"assistant_id": named, "input": {"count": 1}})


def make_cron(_play, me, _whose):
    body = {"assistant_id": "counter", "schedule": "0 0 1 1 *", "input": {}, **me.marked}
    answer = me.client.post("/runs/crons", json=body)
    me.crons.append(answer.json()["cron_id"])
    return answer


def use_cron(play, me, whose):
    named = play.one(whose.crons, _NOTHING)
    if play.chosen.random() < 0.5:
        return me.client.patch(f"/runs/crons/{named}", json=me.marked)
    return me.client.get(f"/runs/crons/{named}")


def search(play, me, whose):
    path = play.chosen.choice(("/threads/search", "/assistants/search", "/runs/crons/search"))
    asked = play.chosen.choice(({}, whose.marked, {"ids": whose.threads[:50]}))
    if "ids" in asked and path != "/threads/search":
        asked = {}
    answer = me.client.post(path, json={**asked, "limit": 1000})
    if asked == whose.marked and whose is not me:
        assert answer.json() == [], play.done[-20:]
    return answer


ACTS = (
    make_thread,
    take_thread,
    patch_thread,
    read_thread,
    copy_thread,
    delete_thread,
    run_on_thread,
    run_on_thread,
    run_without_thread,
    read_run,
    cancel_run,
    cancel_many,
    make_assistant,
    use_assistant,
    make_cron,
    use_cron,
    search,
)
#: Operations on an existing resource: on that of another tenant they are refused.
OF_SOMEBODY = frozenset(
    {
        take_thread,
        patch_thread,
        read_thread,
        copy_thread,
        delete_thread,
        run_on_thread,
        read_run,
        cancel_run,
        use_assistant,
        use_cron,
    }
)


def play(server, seed: int, steps: int) -> None:
    game = Play(server, seed)
    for tenant, act in itertools.product(game.two, (make_thread, run_on_thread, make_assistant)):
        act(game, tenant, tenant)
    for tenant in game.two:
        make_cron(game, tenant, tenant)
    for _ in range(steps):
        game.step()
    game.everything_is_there()
    for tenant in game.two:
        tenant.client.post("/runs/cancel", json={"status": "all"})
        tenant.client.close()


@pytest.mark.parametrize("seed", [0, long_case(1), long_case(2)])
def test_no_caller_sees_resources_of_another(guarded, seed):
    play(guarded, seed, 120)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 140))
def test_no_caller_sees_resources_of_another_in_long_plays(guarded, seed):
    play(guarded, seed, 1_000)
