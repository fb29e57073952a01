"""Crons are created, updated, searched, and fired on time, once, by any sweeper."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from langgraph_sdk.errors import NotFoundError

from belay_server.domain.crons import run_id_of
from tests.acceptance.playing import UNKNOWN, new_thread, refused, stops_all
from tests.waiting import wait_until

__all__ = ["stops_all"]
FIELDS = {
    "cron_id",
    "assistant_id",
    "thread_id",
    "user_id",
    "end_time",
    "schedule",
    "timezone",
    "payload",
    "next_run_date",
    "metadata",
    "on_run_completed",
    "enabled",
    "created_at",
    "updated_at",
}
NEVER_SOON = "0 0 1 1 *"
EVERY_SECOND = "* * * * * *"


@pytest.fixture
def crons(sync_client):
    """Yield the SDK's cron client; crons that a test has created are deleted after it."""
    made = []

    class Crons:
        def create(self, assistant_id="counter", schedule=NEVER_SOON, **options):
            made.append(sync_client.crons.create(assistant_id, schedule=schedule, **options))
            return made[-1]

        def create_for_thread(self, thread_id, schedule=NEVER_SOON, **options):
            cron = sync_client.crons.create_for_thread(
                thread_id, "counter", schedule=schedule, **options
            )
            made.append(cron)
            return cron

        def __getattr__(self, name):
            return getattr(sync_client.crons, name)

    yield Crons()
    for cron in made:
        try:
            sync_client.crons.delete(cron["cron_id"])
        except NotFoundError:
            continue


def moment(text):
    return datetime.fromisoformat(text)


# -- records


def test_a_created_cron_has_the_requested_fields(http, crons):
    end = datetime.now(UTC) + timedelta(days=800)
    cron = crons.create(
        input={"count": 1},
        metadata={"m": 1},
        timezone="Europe/Berlin",
        end_time=end,
        stream_mode="updates",
        durability="sync",
        interrupt_before=["inc"],
        multitask_strategy="reject",
    )
    assert cron.keys() == FIELDS
    assert (cron["thread_id"], cron["on_run_completed"], cron["enabled"]) == (None, "delete", True)
    assert (cron["schedule"], cron["timezone"], cron["user_id"]) == (
        NEVER_SOON,
        "Europe/Berlin",
        "",
    )
    assert moment(cron["end_time"]) == end
    assert moment(cron["next_run_date"]) > datetime.now(UTC)
    assert cron["metadata"] == {"m": 1}
    payload = cron["payload"]
    assert payload["input"] == {"count": 1}
    assert payload["assistant_id"] == cron["assistant_id"]
    assert payload["config"]["configurable"] == {"cron_id": cron["cron_id"]}
    assert payload["stream_mode"] == ["updates"]
    assert http.get(f"/runs/crons/{cron['cron_id']}").json() == cron


def test_a_cron_of_a_thread_has_no_on_run_completed(http, crons):
    thread_id = new_thread(http)
    cron = crons.create_for_thread(thread_id)
    assert (cron["thread_id"], cron["on_run_completed"]) == (thread_id, None)


def test_an_update_of_a_cron_changes_only_the_given_fields(http, crons):
    cron = crons.create(input={"count": 1}, metadata={"a": 1}, context={"by": 2})
    changed = crons.update(
        cron["cron_id"], schedule="@daily", metadata={"b": 2}, input={"count": 5}, timezone="UTC"
    )
    assert changed["schedule"] == "@daily"
    assert changed["metadata"] == {"a": 1, "b": 2}
    assert changed["payload"]["input"] == {"count": 5}
    assert changed["payload"]["context"] == {"by": 2}
    assert moment(changed["next_run_date"]) < datetime.now(UTC) + timedelta(days=2)
    assert changed["created_at"] == cron["created_at"]
    path = f"/runs/crons/{cron['cron_id']}"
    assert http.patch(path, json={"timezone": None, "end_time": None}).json()["timezone"] is None


def test_a_deleted_cron_is_not_found(http, crons):
    cron = crons.create()
    crons.delete(cron["cron_id"])
    with pytest.raises(NotFoundError):
        crons.delete(cron["cron_id"])
    assert refused(http.get(f"/runs/crons/{cron['cron_id']}"), 404) == "Not Found"


def test_deleting_a_thread_or_an_assistant_deletes_its_crons(http, sync_client, crons):
    thread_id = new_thread(http)
    assistant = sync_client.assistants.create("counter")
    made = [crons.create_for_thread(thread_id), crons.create(assistant["assistant_id"])]
    sync_client.threads.delete(thread_id)
    sync_client.assistants.delete(assistant["assistant_id"])
    for cron in made:
        refused(http.get(f"/runs/crons/{cron['cron_id']}"), 404)


def test_crons_are_searched_and_counted_by_the_same_filters(http, crons):
    tag = {"tag": uuid.uuid4().hex}
    thread_id = new_thread(http)
    one = crons.create(metadata=tag)
    two = crons.create_for_thread(thread_id, metadata=tag, enabled=False)

    def ids(**options):
        return [cron["cron_id"] for cron in crons.search(metadata=tag, **options)]

    assert ids() == [two["cron_id"], one["cron_id"]]
    assert ids(sort_by="created_at", sort_order="asc") == [one["cron_id"], two["cron_id"]]
    assert ids(thread_id=thread_id) == [two["cron_id"]]
    assert ids(enabled=True) == [one["cron_id"]]
    assert ids(assistant_id=one["assistant_id"], limit=1, offset=1) == [one["cron_id"]]
    assert crons.count(metadata=tag) == 2
    assert crons.count(metadata=tag, thread_id=thread_id) == 1
    (chosen, *_) = crons.search(metadata=tag, select=["cron_id", "enabled"])
    assert chosen == {"cron_id": two["cron_id"], "enabled": False}


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"schedule": "bad"}, 422, "Invalid cron schedule: 'bad'. Reason: "),
        ({"schedule": "0 0 31 2 *"}, 422, "Invalid cron schedule"),
        ({"timezone": "Bad/Zone"}, 422, "Invalid timezone: 'Bad/Zone'"),
        ({"end_time": "2020-01-01T00:00:00Z"}, 422, "end_time"),
        ({"end_time": "bad"}, 422, "end_time"),
        ({"assistant_id": "nope"}, 404, "Assistant 'nope' not found"),
        ({"assistant_id": UNKNOWN}, 404, f"Assistant '{UNKNOWN}' not found"),
        ({"interrupt_before": ["nope"]}, 422, "Node 'nope'"),
        ({"context": {"a": 1}, "config": {"configurable": {"a": 1}}}, 400, "both"),
    ],
)
def test_an_invalid_cron_is_refused(http, body, status, detail):
    whole = {"assistant_id": "counter", "schedule": NEVER_SOON, **body}
    assert detail in refused(http.post("/runs/crons", json=whole), status)


@pytest.mark.parametrize("missing", ["assistant_id", "schedule"])
def test_a_cron_without_an_assistant_or_a_schedule_is_refused(http, missing):
    body = {"assistant_id": "counter", "schedule": NEVER_SOON}
    del body[missing]
    assert missing in refused(http.post("/runs/crons", json=body), 422)


def test_an_invalid_update_of_a_cron_is_refused(http, crons):
    path = f"/runs/crons/{crons.create()['cron_id']}"
    assert refused(http.patch(path, json={}), 400) == "Request body cannot be empty"
    assert "Invalid cron schedule" in refused(http.patch(path, json={"schedule": "bad"}), 422)
    unknown = http.patch(f"/runs/crons/{UNKNOWN}", json={"enabled": False})
    assert refused(unknown, 404) == f"Cron '{UNKNOWN}' not found"
    thread = http.post(
        f"/threads/{UNKNOWN}/runs/crons", json={"assistant_id": "counter", "schedule": NEVER_SOON}
    )
    assert f"Thread with ID '{UNKNOWN}' not found" in refused(thread, 404)


# -- firing


def runs_of(client, thread_id):
    return client.runs.list(thread_id, limit=100)


def due_time(cron, run):
    """Return the due time for which a run was created; the run's id is derived from it."""
    created = moment(run["created_at"]).replace(microsecond=0)
    for back in range(5):
        at = created - timedelta(seconds=back)
        if str(run_id_of(uuid.UUID(cron["cron_id"]), at)) == run["run_id"]:
            return at
    raise AssertionError(f"not created for any second before {created}")


def test_a_cron_fires_on_its_thread_once_each_time_it_is_due(http, sync_client, crons):
    thread_id = new_thread(http)
    cron = crons.create_for_thread(
        thread_id, EVERY_SECOND, input={"count": 1}, metadata={"m": 1}, context={"by": 4}
    )
    wait_until(lambda: len(runs_of(sync_client, thread_id)) >= 3, 20, "three runs")
    crons.update(cron["cron_id"], enabled=False)
    runs = runs_of(sync_client, thread_id)[::-1]
    due = [due_time(cron, run) for run in runs]
    assert due == sorted(set(due))
    for run in runs:
        assert run["metadata"]["m"] == 1
        assert run["kwargs"]["config"]["configurable"]["cron_id"] == cron["cron_id"]
        assert sync_client.runs.join(thread_id, run["run_id"]) == {"count": 5}


def test_a_cron_that_is_changed_again_and_again_still_fires(http, sync_client, crons):
    """A change that does not move its times does not displace a run that is due."""
    thread_id = new_thread(http)
    cron = crons.create_for_thread(thread_id, EVERY_SECOND, input={"count": 1})

    def has_fired() -> bool:
        for number in range(20):
            crons.update(cron["cron_id"], metadata={"number": number}, enabled=True)
        return len(runs_of(sync_client, thread_id)) >= 3

    wait_until(has_fired, 30, "three runs")


def test_a_disabled_cron_does_not_fire_until_it_is_enabled(http, sync_client, crons):
    asleep, awake = new_thread(http), new_thread(http)
    cron = crons.create_for_thread(asleep, EVERY_SECOND, enabled=False, input={"count": 1})
    crons.create_for_thread(awake, EVERY_SECOND, input={"count": 1})
    wait_until(lambda: len(runs_of(sync_client, awake)) >= 2, 20, "the other cron")
    assert runs_of(sync_client, asleep) == []
    crons.update(cron["cron_id"], enabled=True)
    wait_until(lambda: runs_of(sync_client, asleep), 20, "the cron that was enabled")


def test_a_cron_stops_at_its_end_time_and_others_continue(http, sync_client, crons):
    ending, other = new_thread(http), new_thread(http)
    end = datetime.now(UTC) + timedelta(seconds=2.5)
    cron = crons.create_for_thread(ending, EVERY_SECOND, end_time=end, input={"count": 1})
    crons.create_for_thread(other, EVERY_SECOND, input={"count": 1})

    def has_ended():
        return http.get(f"/runs/crons/{cron['cron_id']}").json()["next_run_date"] is None

    wait_until(has_ended, 20, "the end of the cron")
    count = len(runs_of(sync_client, ending))
    assert 1 <= count <= 3
    before = len(runs_of(sync_client, other))
    wait_until(lambda: len(runs_of(sync_client, other)) >= before + 2, 20, "the other cron")
    assert len(runs_of(sync_client, ending)) == count


@pytest.mark.parametrize("on_run_completed", ["keep", "delete"])
def test_each_run_of_a_cron_without_a_thread_has_its_own_thread(
    http, sync_client, crons, beats, on_run_completed
):
    tag = uuid.uuid4().hex
    cron = crons.create(
        "steps",
        EVERY_SECOND,
        input={"beats": str(beats), "tag": tag},
        on_run_completed=on_run_completed,
        metadata={"tag": tag},
    )
    beats.wait_for(f"{tag}s4:end", 2)
    crons.delete(cron["cron_id"])

    def threads():
        found = sync_client.threads.search(values={"tag": tag}, limit=100)
        return [thread["thread_id"] for thread in found]

    if on_run_completed == "keep":
        wait_until(lambda: len(threads()) >= 2, 20, "threads that are kept")
    else:
        wait_until(lambda: threads() == [], 20, "threads to go")


def test_a_cron_of_a_busy_thread_follows_its_multitask_strategy(http, sync_client, crons, beats):
    thread_id = new_thread(http)
    body = {"beats": str(beats), "seconds": 60}
    first = sync_client.runs.create(thread_id, "steps", input=body)
    beats.wait_for("s1:start")
    cron = crons.create_for_thread(
        thread_id, EVERY_SECOND, multitask_strategy="interrupt", input={"count": 1}
    )

    def status():
        return sync_client.runs.get(thread_id, first["run_id"])["status"]

    wait_until(lambda: status() == "interrupted", 20, "the interrupt")
    wait_until(lambda: len(runs_of(sync_client, thread_id)) >= 2, 20, "the cron's run")
    crons.delete(cron["cron_id"])
