"""The store: items that clients put and graphs write, in one place."""

from __future__ import annotations

import uuid

import pytest

from tests.acceptance.playing import new_thread, refused, stops_all, until_status
from tests.waiting import wait_until

__all__ = ["stops_all"]


@pytest.fixture
def root():
    """Return a namespace that only this test uses."""
    return uuid.uuid4().hex


@pytest.fixture
def put(sync_client, root):
    def put_item(key, value, *labels, **options):
        sync_client.store.put_item([root, *labels], key=key, value=value, **options)

    return put_item


@pytest.fixture
def search(sync_client, root):
    def keys(*labels, **options):
        found = sync_client.store.search_items([root, *labels], **options)
        return [item["key"] for item in found["items"]]

    return keys


# -- items


def test_an_item_is_returned_as_it_was_put(sync_client, root, put):
    value = {"name": "Ä", "n": 1.5, "deep": {"list": [1, None, {"a": True}]}}
    put("k", value, "users")
    item = sync_client.store.get_item([root, "users"], "k")
    assert item.keys() == {"namespace", "key", "value", "created_at", "updated_at"}
    assert (item["namespace"], item["key"], item["value"]) == ([root, "users"], "k", value)


def test_an_item_that_is_put_again_keeps_its_creation_time(sync_client, root, put):
    put("k", {"a": 1})
    first = sync_client.store.get_item([root], "k")
    put("k", {"b": 2})
    second = sync_client.store.get_item([root], "k")
    assert second["value"] == {"b": 2}
    assert second["created_at"] == first["created_at"]
    assert second["updated_at"] > first["updated_at"]


def test_a_missing_item_is_null_and_may_be_deleted(sync_client, root, put):
    assert sync_client.store.get_item([root], "k") is None
    sync_client.store.delete_item([root], "k")
    put("k", {"a": 1})
    sync_client.store.delete_item([root], "k")
    assert sync_client.store.get_item([root], "k") is None


def test_a_key_may_be_empty_and_a_namespace_deep(sync_client, root):
    labels = [root, *(f"level {n}" for n in range(20))]
    sync_client.store.put_item(labels, key="", value={"a": 1})
    assert sync_client.store.get_item(labels, "")["namespace"] == labels


def test_an_index_path_given_twice_is_indexed_once(sync_client, root, put, search):
    put("k", {"note": "green tea"}, index=["note", "note"])
    assert search(query="green tea") == ["k"]


@pytest.mark.parametrize("query", ["key=%00&namespace=a", "key=k&namespace=a.b%00"])
def test_an_item_whose_name_cannot_be_stored_is_refused(http, query):
    assert "NUL" in refused(http.get(f"/store/items?{query}"), 422)


def test_a_namespace_may_be_given_with_dots_or_label_by_label(http, root, put):
    put("k", {"a": 1}, "b")
    dotted = {"key": "k", "namespace": f"{root}.b"}
    repeated = {"key": "k", "namespace": [root, "b"]}
    answers = [http.get("/store/items", params=how).json() for how in (dotted, repeated)]
    assert answers[0] == answers[1]
    assert answers[0]["value"] == {"a": 1}


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"namespace": []}, 400, "Namespace cannot be empty."),
        ({"namespace": ["langgraph", "a"]}, 400, "langgraph"),
        ({"namespace": ["a.b"]}, 422, "Namespace label 'a.b'"),
        ({"namespace": ["a", ""]}, 422, "Namespace label ''"),
        ({"namespace": "a"}, 422, "namespace"),
        ({"namespace": [5]}, 422, "namespace"),
        ({"value": "x"}, 422, "value"),
        ({"value": None}, 422, "value"),
        ({"key": 5}, 422, "key"),
        ({"key": "k" * 1025}, 422, "key"),
        ({"ttl": -1}, 422, "ttl"),
        ({"ttl": 0}, 422, "ttl"),
        ({"ttl": "1"}, 422, "ttl"),
        ({"index": "x"}, 422, "index"),
        ({"index": True}, 422, "index"),
        ({"index": [5]}, 422, "index"),
    ],
)
def test_an_invalid_put_is_refused(http, root, body, status, detail):
    whole = {"namespace": [root], "key": "k", "value": {}, **body}
    assert detail in refused(http.put("/store/items", json=whole), status)
    missing = [name for name in ("namespace", "key", "value") if name in body]
    if missing:
        del whole[missing[0]]
        refused(http.put("/store/items", json=whole), 422)


def test_an_invalid_read_or_delete_is_refused(http, root):
    assert refused(http.get("/store/items"), 400) == "Key is required"
    bad = {"key": "k", "namespace": f"{root}..b"}
    assert "Namespace label" in refused(http.get("/store/items", params=bad), 422)
    refused(http.request("DELETE", "/store/items", json={"namespace": [root]}), 422)


# -- searches


def test_a_search_matches_a_prefix_of_whole_labels(put, search, root):
    put("a", {}, "users", "1")
    put("b", {}, "users", "2")
    put("c", {}, "users_too")
    assert set(search()) == {"a", "b", "c"}
    assert set(search("users")) == {"a", "b"}
    assert search("users", "2") == ["b"]
    assert search("nobody") == []


def test_a_store_search_is_paged(put, search):
    for n in range(5):
        put(f"k{n}", {"n": n})
    pages = [search(limit=2, offset=offset) for offset in (0, 2, 4, 6)]
    assert [len(page) for page in pages] == [2, 2, 1, 0]
    assert len({key for page in pages for key in page}) == 5


@pytest.mark.parametrize(
    ("asked", "keys"),
    [
        ({"n": 5}, {"five"}),
        ({"n": {"$eq": 5}}, {"five"}),
        ({"n": {"$ne": 5}}, {"ten", "forty"}),
        ({"n": {"$gt": 5}}, {"ten", "forty"}),
        ({"n": {"$gte": 5}}, {"five", "ten", "forty"}),
        ({"n": {"$lt": 10}}, {"five"}),
        ({"n": {"$lte": 10}}, {"five", "ten"}),
        ({"n": {"$gt": 5, "$lt": 40}}, {"ten"}),
        ({"n": {"$gte": 9.5}}, {"ten", "forty"}),
        ({"name": {"$gt": "b"}}, {"text"}),
        ({"name": "c", "more": True}, {"text"}),
        ({"deep": {"a": 1}}, {"deep"}),
        ({"deep": {"a": 2}}, set()),
        ({"list": [1, 2]}, {"deep"}),
        ({"nothing": {"$lt": 5}}, set()),
        ({}, {"five", "ten", "forty", "text", "deep"}),
    ],
)
def test_a_filter_compares_numbers_as_numbers(put, search, asked, keys):
    put("five", {"n": 5})
    put("ten", {"n": 10})
    put("forty", {"n": 40, "name": "a"})
    put("text", {"name": "c", "more": True})
    put("deep", {"deep": {"a": 1}, "list": [1, 2]})
    assert set(search(filter=asked)) == keys


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        ({"filter": {"a": {"$bad": 1}}}, 400, "Unsupported operator: $bad"),
        ({"filter": {"a": {"$gt": 1, "b": 2}}}, 400, "Unsupported operator: b"),
        ({"filter": {"a": {"$gt": [1]}}}, 400, "$gt"),
        ({"filter": []}, 422, "filter"),
        ({"limit": 0}, 422, "limit"),
        ({"limit": -1}, 422, "limit"),
        ({"limit": 1001}, 422, "limit"),
        ({"offset": -1}, 422, "offset"),
        ({"query": 5}, 422, "query"),
        ({"namespace_prefix": "x"}, 422, "namespace_prefix"),
        ({"namespace_prefix": ["a.b"]}, 422, "Namespace label"),
    ],
)
def test_an_invalid_store_search_is_refused(http, body, status, detail):
    assert detail in refused(http.post("/store/items/search", json=body), status)


def test_a_search_of_everything_needs_no_namespace(http, put):
    put("k", {"a": 1})
    answer = http.post("/store/items/search", json={"limit": 1000}).json()
    assert answer["items"][0]["score"] is None


def test_a_search_by_meaning_finds_the_nearest_first(sync_client, root, put):
    put("sea", {"text": "the salt of the sea"})
    put("tea", {"text": "a cup of green tea"})
    put("untold", {"text": "a cup of green tea"}, index=False)
    put("elsewhere", {"title": "a cup of green tea"}, index=["title"])
    found = sync_client.store.search_items([root], query="green tea in a cup")["items"]
    scores = {item["key"]: item["score"] for item in found}
    assert {found[0]["key"], found[1]["key"]} == {"tea", "elsewhere"}
    assert scores["tea"] > scores["sea"]
    assert scores.get("untold") is None


# -- namespaces


def test_only_namespaces_with_items_are_listed(sync_client, root, put):
    def namespaces(**options):
        found = sync_client.store.list_namespaces(prefix=[root], **options)["namespaces"]
        return [tuple(labels[1:]) for labels in found]

    put("k", {}, "a", "x")
    put("k", {}, "a", "y", "deep")
    put("k", {}, "b", "x")
    sync_client.store.get_item([root, "asked"], "k")
    assert namespaces() == [("a", "x"), ("a", "y", "deep"), ("b", "x")]
    assert namespaces(max_depth=2) == [("a",), ("b",)]
    assert namespaces(suffix=["x"]) == [("a", "x"), ("b", "x")]
    assert namespaces(limit=1, offset=1) == [("a", "y", "deep")]
    anywhere = sync_client.store.list_namespaces(prefix=[root, "*", "x"])["namespaces"]
    assert anywhere == [[root, "a", "x"], [root, "b", "x"]]


@pytest.mark.parametrize(
    "body", [{"max_depth": 0}, {"limit": 0}, {"offset": -1}, {"prefix": "x"}, {"suffix": [5]}]
)
def test_an_invalid_namespaces_query_is_refused(http, body):
    refused(http.post("/store/namespaces", json=body), 422)


# -- time to live


def test_an_expired_item_is_not_returned(sync_client, root, put):
    put("soon", {"a": 1}, ttl=0.01)
    put("later", {"a": 1}, ttl=60)
    put("ever", {"a": 1})
    shown = [item["key"] for item in sync_client.store.search_items([root])["items"]]
    assert {"later", "ever"} <= set(shown)

    def is_gone():
        return sync_client.store.get_item([root], "soon", refresh_ttl=False) is None

    wait_until(is_gone, 10, "the expiry")
    left = [item["key"] for item in sync_client.store.search_items([root])["items"]]
    assert set(left) == {"later", "ever"}


@pytest.mark.parametrize("ttl", [5e-324, 1e-300, 1e-20, 1e-10, 1e-6])
def test_an_item_may_have_a_tiny_time_to_live(sync_client, root, put, ttl):
    put("soon", {"a": 1}, ttl=ttl)

    def is_gone():
        return sync_client.store.get_item([root], "soon", refresh_ttl=False) is None

    wait_until(is_gone, 10, "the expiry")


# -- graphs


def test_graphs_and_clients_share_the_store(sync_client, root):
    def run(said):
        body = {"user": root, "said": said}
        return sync_client.runs.wait(None, "memory", input=body)["remembered"]

    assert run("tea") == ["async: tea", "sync: tea"]
    item = sync_client.store.get_item(["memories", root], "sync")
    assert item["value"] == {"text": "tea"}
    sync_client.store.put_item(["memories", root], key="mine", value={"text": "coffee"})
    assert run("cake") == ["async: cake", "mine: coffee", "sync: cake"]


def test_a_run_that_is_writing_to_the_store_can_be_cancelled(http, sync_client, root, beats):
    thread_id = new_thread(http)
    body = {"user": root, "seconds": 60, "beats": str(beats)}
    run = sync_client.runs.create(thread_id, "busy_memory", input=body)
    beats.wait_for("put:start")
    sync_client.runs.cancel(thread_id, run["run_id"], wait=True)
    until_status(http, thread_id, run["run_id"], "interrupted")
    stopped_at = sync_client.store.get_item(["many", root], "last")
    # The stopped child, or its replacement, executes the next run.
    assert sync_client.runs.wait(None, "memory", input={"user": root, "said": "x"})["remembered"]
    assert sync_client.store.get_item(["many", root], "last") == stopped_at


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("raise in the embedding", "failed: RuntimeError"),
        ("exit in the embedding", "failed: RuntimeError"),
        ("none in the embedding", "returned 0 vectors for 1 texts"),
    ],
)
def test_a_failed_embedding_is_503_and_stores_nothing(http, text, failure):
    item = {"namespace": ["failed"], "key": text, "value": {"text": text}}
    for answer in (
        http.put("/store/items", json=item),
        http.post("/store/items/search", json={"namespace_prefix": ["failed"], "query": text}),
    ):
        assert refused(answer, 503) == f"The embedding function of the store {failure}"
        assert "retry-after" in answer.headers
    params = {"namespace": "failed", "key": text}
    assert http.get("/store/items", params=params).json() is None
