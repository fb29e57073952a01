"""JSON of every size and shape, sent to every route that takes a body.

Every response has a status below 500, and the memory is released afterwards.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.attacks.conftest import watching, web_memory
from tests.long_forms import in_turn

#: The most memory that one request may cost: a multiple of its size, or this much in any case.
_TIMES, _ANYWAY = 50, 60 * 1024 * 1024
_LONGEST_STALL_SECONDS = 0.25
_JSON = {"content-type": "application/json"}


def many_keys(size: int) -> bytes:
    return b"{" + b",".join(b'"%d":0' % i for i in range(size // 10)) + b"}"


def many_lists(size: int) -> bytes:
    return b"[" + b"[]," * (size // 3) + b"0]"


def many_texts(size: int) -> bytes:
    return b"[" + b'"",' * (size // 3) + b"0]"


def many_numbers(size: int) -> bytes:
    return b"[" + b"1e9," * (size // 4) + b"0]"


def one_text(size: int) -> bytes:
    return b'"' + b"x" * size + b'"'


def escapes(size: int) -> bytes:
    return b'"' + b"\\u00e9" * (size // 6) + b'"'


def backslashes(size: int) -> bytes:
    return b'"' + b"\\\\" * (size // 2) + b'"'


def commas_in_a_text(size: int) -> bytes:
    return b'"' + b",[{:" * (size // 4) + b'"'


def deep(size: int) -> bytes:
    return b"[" * (size // 2) + b"]" * (size // 2)


def cut_off(size: int) -> bytes:
    return b'{"a":"' + b'\\"' * (size // 2)


def no_utf8(size: int) -> bytes:
    return b'"' + b"\xff" * size + b'"'


SHAPES: tuple[Callable[[int], bytes], ...] = (
    many_keys,
    many_lists,
    many_texts,
    many_numbers,
    one_text,
    escapes,
    backslashes,
    commas_in_a_text,
    deep,
    cut_off,
    no_utf8,
)
#: Fields whose value is replaced by the shape, in a body that is otherwise valid for many routes.
PLACES = ("metadata", "input", "values", "context", "value", "config", "filter")


def routes(server) -> Iterator[tuple[str, str]]:
    """Yield every operation with a body, with ids that do not exist."""
    document = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if isinstance(operation, dict) and "requestBody" in operation:
                yield method.upper(), re.sub(r"\{[^}]*\}", str(uuid.uuid4()), path)


def bodies(shape: bytes, chosen: random.Random) -> Iterator[bytes]:
    """Yield the shape as a whole body, and within a body that most routes would accept."""
    yield shape
    place = chosen.choice(PLACES)
    yield (
        b'{"assistant_id":"counter","graph_id":"counter","namespace":["a"],"key":"k",'
        b'"schedule":"0 0 1 1 *","thread_ids":[],"%b":%b}' % (place.encode(), shape)
    )


@pytest.mark.parametrize(("shape", "size"), in_turn(SHAPES, [30_000, 2_000_000, 100]))
def test_no_body_causes_a_server_error(open_server, shape, size):
    chosen = random.Random(f"{shape.__name__} {size}")
    before = web_memory(open_server)
    asked = list(routes(open_server))
    if size > 100_000:
        asked = chosen.sample(asked, 6)
    with httpx.Client(base_url=open_server.url, timeout=120) as client:
        for method, path in asked:
            for body in bodies(shape(size), chosen):
                answer = client.request(method, path, content=body, headers=_JSON)
                assert answer.status_code < 500, (method, path, answer.text)
        assert client.get("/ok").status_code == 200
    assert web_memory(open_server) - before < size * _TIMES + _ANYWAY


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1_000_000, 4_000_000, 8_300_000, 30_000_000])
def test_no_body_delays_other_requests(open_server, shape, size):
    """Compare with the response times during small requests on the same machine."""
    chosen = random.Random(f"{shape.__name__} {size}")
    asked = chosen.sample(list(routes(open_server)), 5)
    # Built in advance: building them would slow the monitor, which runs in this process.
    made = [(*route, body) for route in asked for body in bodies(shape(size), chosen)]
    with httpx.Client(base_url=open_server.url, timeout=120) as client:
        with watching(open_server) as usual:
            for _ in range(40):
                client.post("/threads/search", json={})
        with watching(open_server) as stalls:
            for method, path, body in made:
                answer = client.request(method, path, content=body, headers=_JSON)
                assert answer.status_code < 500, (method, path, answer.text)
    assert stalls.longest < _LONGEST_STALL_SECONDS + 2 * usual.longest


@pytest.mark.full
def test_concurrent_large_bodies_do_not_delay_other_requests(open_server):
    """Large bodies are processed one at a time: other requests wait for one of them only."""
    context = b"[" + b'{"a":1,"b":"xxxxxxxxxxxxxxxx"},' * 39_000 + b"0]"
    body = b'{"assistant_id":"counter","input":{"count":1},"context":{"x":%b}}' % context
    with httpx.Client(base_url=open_server.url, timeout=120) as client:
        with watching(open_server) as usual:
            for _ in range(40):
                client.post("/threads/search", json={})

        def post(_: int) -> int:
            return client.post("/runs", content=body, headers=_JSON).status_code

        with watching(open_server) as stalls, ThreadPoolExecutor(20) as many:
            statuses = set(many.map(post, range(40)))
    assert statuses <= {200, 429}
    assert 200 in statuses
    assert stalls.longest < _LONGEST_STALL_SECONDS + 2 * usual.longest
