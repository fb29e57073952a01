"""Test the project's own authentication, as `langgraph_sdk.Auth` documents it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from flask import Flask
from langgraph_sdk import Auth
from starlette.exceptions import HTTPException as StarletteException
from werkzeug.datastructures import Headers

from belay_server.api.context import CONTEXT
from belay_server.api.http.bodies.large_bodies import LARGE_BODIES, LargeBodies
from belay_server.api.project import auth as project_auth
from belay_server.api.project.auth import ProjectAuth, ProjectUser
from belay_server.api.project.auth_cache import AuthCache
from belay_server.domain.access import Caller
from belay_server.domain.errors import Forbidden, Refused, Unavailable
from belay_server.graphs.project.auth_section import AuthCacheConfig
from belay_server.graphs.project.loading import ProjectError

ANN = Caller("user:ann", "ann", user={"identity": "ann", "permissions": ["read"], "plan": "gold"})
SOURCE = """
from langgraph_sdk import Auth

auth = Auth()
{body}
"""


def load(tmp_path: Path, body: str, variable: str = "auth", cache=None) -> ProjectAuth:
    (tmp_path / "auth.py").write_text(SOURCE.format(body=body))
    project = SimpleNamespace(
        root=tmp_path, dependencies=(), auth=f"./auth.py:{variable}", auth_cache=cache
    )
    return ProjectAuth.load(project)


def authenticating(tmp_path: Path, signature: str, result: str) -> ProjectAuth:
    return load(
        tmp_path, f"@auth.authenticate\nasync def authenticate({signature}):\n    return {result}"
    )


def ask(auth: ProjectAuth, **how) -> Caller:
    app = Flask(__name__)
    settings = SimpleNamespace(body_seconds=5.0, max_body_values=1_000)
    parts = SimpleNamespace(settings=settings)
    app.extensions[CONTEXT] = SimpleNamespace(parts=parts)
    app.extensions[LARGE_BODIES] = LargeBodies(1_000_000, lambda: "nobody")
    app.add_url_rule("/threads/<thread_id>", "thread", methods=["POST"])
    with app.test_request_context("/threads/t1?a=1", method="POST", **how):
        return auth.caller()


# --- authentication -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "told"),
    [
        ("path", "/threads/t1"),
        ("method", "POST"),
        ("path_params", "{'thread_id': 't1'}"),
        ("query_params", "{'a': '1'}"),
        ("authorization", "Bearer x"),
        ("body", "{'n': 1}"),
    ],
)
def test_authenticate_receives_the_parameters_it_names(tmp_path, parameter, told):
    auth = authenticating(tmp_path, parameter, f"str({parameter})")
    caller = ask(auth, json={"n": 1}, headers={"Authorization": "Bearer x"})
    assert (caller.team, caller.name) == (told, f"user:{told}")


def test_headers_are_bytes_with_lower_case_names(tmp_path):
    auth = authenticating(tmp_path, "headers: dict", "headers[b'x-team'].decode()")
    assert ask(auth, headers={"X-Team": "blue"}).team == "blue"


def test_the_request_is_a_starlette_request(tmp_path):
    result = "request.headers['x-team'] + request.url.path + (await request.json())['n']"
    auth = authenticating(tmp_path, "request", result)
    assert ask(auth, json={"n": "!"}, headers={"X-Team": "blue"}).team == "blue/threads/t1!"


@pytest.mark.parametrize("data", [b"", b"{", b"\xff"])
def test_a_body_that_cannot_be_read_is_none(tmp_path, data):
    auth = authenticating(tmp_path, "body", "str(body)")
    assert ask(auth, data=data).team == "None"


def test_without_a_header_authorization_is_none(tmp_path):
    assert ask(authenticating(tmp_path, "authorization", "str(authorization)")).team == "None"


def test_a_parameter_with_a_default_may_have_any_name(tmp_path):
    assert ask(authenticating(tmp_path, "path, flavour='plain'", "flavour")).team == "plain"


def test_authenticate_may_be_a_plain_function(tmp_path):
    auth = load(tmp_path, "@auth.authenticate\ndef authenticate(path):\n    return path")
    assert ask(auth).team == "/threads/t1"


@pytest.mark.parametrize(
    ("result", "fields"),
    [
        ("'ann'", {"identity": "ann", "permissions": []}),
        ("{'identity': 'ann', 'permissions': ['a'], 'x': 1}", {"permissions": ["a"], "x": 1}),
        (
            "type('User', (), {'identity': 'ann', 'permissions': ('a',)})()",
            {"identity": "ann", "permissions": ["a"]},
        ),
    ],
)
def test_a_user_may_be_an_id_a_mapping_or_an_object(tmp_path, result, fields):
    caller = ask(authenticating(tmp_path, "path", result))
    assert caller.team == "ann"
    assert caller.user is not None
    assert caller.user.items() >= fields.items()


@pytest.mark.parametrize("result", ["None", "{}", "{'identity': ''}", "5"])
def test_a_user_without_an_identity_is_an_error(tmp_path, result):
    with pytest.raises(TypeError, match="identity"):
        ask(authenticating(tmp_path, "path", result))


def test_an_authentication_that_hangs_is_cancelled_and_unavailable(tmp_path, monkeypatch):
    left = tmp_path / "left"
    body = f"""
import asyncio

@auth.authenticate
async def authenticate():
    try:
        await asyncio.sleep(60)
    finally:
        open({str(left)!r}, "w").close()
"""
    auth = load(tmp_path, body)
    monkeypatch.setattr(project_auth, "_HANDLER_SECONDS", 0.05)
    with pytest.raises(Unavailable, match="exceeded its time limit"):
        ask(auth)
    assert left.exists()


def test_a_refusal_keeps_its_status_detail_and_headers(tmp_path):
    auth = load(
        tmp_path,
        "@auth.authenticate\nasync def authenticate(path):\n"
        "    raise Auth.exceptions.HTTPException(status_code=403, detail='no', headers={'a': 'b'})",
    )
    with pytest.raises(Refused) as refusal:
        ask(auth)
    assert (refusal.value.status, refusal.value.detail) == (403, "no")
    assert refusal.value.headers == {"a": "b"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "@authenticate"),
        ("@auth.authenticate\nasync def authenticate(token): ...", "takes 'token'"),
        ("raise ValueError('at import')", "at import"),
    ],
)
def test_an_unusable_authenticate_handler_stops_the_start(tmp_path, body, message):
    with pytest.raises(ProjectError, match=message):
        load(tmp_path, body)


def test_an_object_that_is_not_an_auth_stops_the_start(tmp_path):
    with pytest.raises(ProjectError, match=r"langgraph_sdk\.Auth"):
        load(tmp_path, "other = 5", "other")


# --- authorization ------------------------------------------------------------------------------


def deciding(auth: Auth) -> ProjectAuth:
    return ProjectAuth(auth, [])


def test_only_the_most_specific_handler_is_called():
    auth, asked = Auth(), []

    def note(name):
        async def handler(ctx, value):
            asked.append((name, ctx.resource, ctx.action))

        return handler

    auth.on(note("global"))
    auth.on.threads(note("threads"))
    auth.on.threads.create(note("threads.create"))
    auth.on(actions="search")(note("search of anything"))
    project = deciding(auth)
    for resource, action in (
        ("threads", "create"),
        ("threads", "search"),
        ("assistants", "search"),
        ("crons", "read"),
        ("store", "put"),
    ):
        assert project.decide(ANN, resource, action, {}) is None
    assert [name for name, _, _ in asked] == [
        "threads.create",
        "threads",
        "search of anything",
        "global",
        "global",
    ]
    assert asked[0][1:] == ("threads", "create")


def test_without_a_handler_an_action_is_allowed():
    assert deciding(Auth()).decide(ANN, "threads", "read", {}) is None


def test_a_handler_receives_the_user_and_may_change_the_value():
    auth = Auth()

    @auth.on
    async def handler(ctx, value):
        assert ctx.user.identity == ctx.user["identity"] == "ann"
        assert ctx.permissions == ctx.user.permissions == ["read"]
        assert ctx.user.plan == "gold"
        assert "plan" in ctx.user
        assert ctx.user.is_authenticated
        value["metadata"] = {"owner": ctx.user.display_name}
        return {"owner": {"$eq": "ann"}}

    value: dict = {}
    assert deciding(auth).decide(ANN, "threads", "create", value) == {"owner": {"$eq": "ann"}}
    assert value == {"metadata": {"owner": "ann"}}


@pytest.mark.parametrize(("answer", "allowed"), [(True, True), (None, True), (False, False)])
def test_a_handler_allows_with_true_or_none_and_denies_with_false(answer, allowed):
    auth = Auth()

    @auth.on
    async def handler(ctx, value):
        return answer

    if allowed:
        assert deciding(auth).decide(ANN, "threads", "read", {}) is None
    else:
        with pytest.raises(Forbidden):
            deciding(auth).decide(ANN, "threads", "read", {})


@pytest.mark.parametrize("answer", ["yes", 1, ["owner"], 0, ""])
def test_an_invalid_result_of_a_handler_is_an_error(answer):
    auth = Auth()

    @auth.on
    async def handler(ctx, value):
        return answer

    with pytest.raises(TypeError, match=r"threads\.read"):
        deciding(auth).decide(ANN, "threads", "read", {})


@pytest.mark.parametrize("kind", [Auth.exceptions.HTTPException, StarletteException])
def test_a_handler_may_refuse_with_a_status(kind):
    auth = Auth()

    @auth.on
    async def handler(ctx, value):
        raise kind(status_code=404, detail="nothing here")

    with pytest.raises(Refused) as refusal:
        deciding(auth).decide(ANN, "threads", "read", {})
    assert (refusal.value.status, refusal.value.detail) == (404, "nothing here")


def test_a_user_has_only_the_given_fields():
    user = ProjectUser({"identity": "ann"})
    assert set(user) == {"identity", "display_name", "is_authenticated", "permissions"}
    assert not hasattr(user, "plan")
    with pytest.raises(KeyError):
        user["plan"]


@pytest.mark.parametrize("user", ["'ann'", "{'identity': 'ann'}"])
def test_authenticate_may_return_the_permissions_and_the_user(tmp_path, user):
    caller = ask(authenticating(tmp_path, "", f"['read', 'write'], {user}"))
    assert caller.name == "user:ann"
    assert caller.user["permissions"] == ["read", "write"]


@pytest.mark.parametrize("result", ["()", "('a', 'b', 'c')", "([], None)"])
def test_another_result_of_authenticate_is_an_error(tmp_path, result):
    with pytest.raises(TypeError, match="must return a user"):
        ask(authenticating(tmp_path, "", result))


@pytest.mark.parametrize(("message", "detail"), [("'Not yours'", "Not yours"), ("''", "Forbidden")])
def test_a_failed_assertion_of_a_handler_forbids_the_action(message, detail):
    auth = Auth()

    @auth.on
    async def handler(ctx, value):
        raise AssertionError(*filter(None, [message.strip("'")]))

    with pytest.raises(Refused, match=detail) as raised:
        deciding(auth).decide(ANN, "store", "put", {})
    assert raised.value.status == 403


# --- auth.cache ---------------------------------------------------------------------------------

COUNTING = """
calls = 0

@auth.authenticate
async def authenticate(authorization, headers):
    global calls
    calls += 1
    if authorization == "bad":
        raise Auth.exceptions.HTTPException(status_code=401, detail=f"refused {calls}")
    return {"identity": f"{authorization}-{calls}", "roles": []}
"""


def test_a_caller_is_remembered_by_the_named_headers(tmp_path):
    cache = AuthCacheConfig(("authorization", "x-team"), seconds=60, most_callers=3)
    auth = load(tmp_path, COUNTING, cache=cache)

    def identity(**headers):
        caller = ask(auth, headers={name.replace("_", "-"): v for name, v in headers.items()})
        caller.user["roles"].append("changed")
        assert caller.user["roles"] == ["changed"]
        return caller.team

    assert identity(authorization="ann") == identity(authorization="ann", accept="x") == "ann-1"
    assert identity(authorization="ann", x_team="b") == "ann-2"
    assert identity(authorization="bob") == identity(authorization="bob") == "bob-3"
    for attempt in (4, 5):
        with pytest.raises(Refused, match=f"refused {attempt}"):
            identity(authorization="bad")
    assert identity() == "None-6"
    assert identity() == "None-7"
    assert identity(authorization="cyd") == "cyd-8"  # the fourth: the others are forgotten
    assert identity(authorization="ann") == "ann-9"


def test_a_caller_is_forgotten_when_the_time_is_over():
    now = [0.0]
    cache = AuthCache(AuthCacheConfig(("authorization",), seconds=60), clock=lambda: now[0])
    callers = iter([ANN, Caller("user:ann", "later")])
    headers = Headers({"authorization": "ann"})
    assert cache.caller(headers, lambda: next(callers)).team == "ann"
    now[0] = 59.9
    assert cache.caller(headers, lambda: next(callers)).team == "ann"
    now[0] = 60.0
    assert cache.caller(headers, lambda: next(callers)).team == "later"
