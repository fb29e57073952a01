"""Authentication for two kinds of users: owners may read their resources; readers of a thread too.

A token is `<name>` or `<name>:<permission>`, optionally followed by `/<secret>`. Some names cause
errors.
"""

from __future__ import annotations

import sys
from datetime import timedelta

from langgraph_sdk import Auth
from langgraph_sdk.cache import swr

auth = Auth()


@auth.authenticate
async def authenticate(
    authorization: str | None, headers: dict, method: str, path: str, query_params: dict
) -> Auth.types.MinimalUserDict:
    given = (authorization or "").removeprefix("Bearer ").strip()
    token = given.partition("/")[0]
    if not token:
        raise Auth.exceptions.HTTPException(
            status_code=401, detail="Who are you?", headers={"WWW-Authenticate": "Bearer"}
        )
    if token == "banned":
        raise Auth.exceptions.HTTPException(status_code=403, detail="You are banned")
    if token == "broken":
        raise RuntimeError("the provider said s3cr3t-canary")
    if token == "exits":
        sys.exit("s3cr3t-canary")
    name, _, permission = token.partition(":")
    assert headers[b"authorization"].decode().endswith(given)
    assert path.startswith("/")
    assert method.isupper()
    return {
        "identity": name,
        "permissions": [permission] if permission else [],
        "plan": await _plan_of(name),
    }


async def _plan_of(name: str) -> str:
    """Return the plan of a user from the cache, as from a slow service behind it."""

    async def look_up() -> str:
        return "gold"

    found = await swr(f"plan:{name}", look_up, fresh_for=timedelta(minutes=1))
    return found.value


def _mine(ctx: Auth.types.AuthContext, value: dict) -> dict:
    metadata = value.get("metadata") or {}
    value["metadata"] = {**metadata, "owner": ctx.user.identity}
    return {"owner": ctx.user.identity}


@auth.on
async def everything(ctx: Auth.types.AuthContext, value: dict):
    return False


@auth.on.assistants
async def assistants(ctx: Auth.types.AuthContext, value: dict):
    return {"owner": ctx.user.identity}


@auth.on.assistants.create
async def assistants_create(ctx: Auth.types.AuthContext, value: dict):
    return _mine(ctx, value)


@auth.on.crons
async def crons(ctx: Auth.types.AuthContext, value: dict):
    return {"owner": {"$eq": ctx.user.identity}}


@auth.on.crons.create
async def crons_create(ctx: Auth.types.AuthContext, value: dict):
    assert value["schedule"]
    given = value["payload"].get("input") or {}
    if isinstance(given, dict):
        value["payload"]["input"] = {**given, "note": "by a handler"}
    return _mine(ctx, value)


@auth.on.threads
async def threads(ctx: Auth.types.AuthContext, value: dict):
    return {"owner": ctx.user.identity}


@auth.on.threads.create
async def threads_create(ctx: Auth.types.AuthContext, value: dict):
    return _mine(ctx, value)


@auth.on.threads.create_run
async def create_run(ctx: Auth.types.AuthContext, value: dict):
    if "no-runs" in ctx.permissions:
        return False
    return _mine(ctx, value)


@auth.on.threads.search
async def threads_search(ctx: Auth.types.AuthContext, value: dict):
    return False if "no-search" in ctx.permissions else {"owner": ctx.user.identity}


@auth.on.threads.read
async def threads_read(ctx: Auth.types.AuthContext, value: dict):
    me = ctx.user["identity"]
    return {"$or": [{"owner": me}, {"readers": {"$contains": me}}]}


@auth.on.store
async def store(ctx: Auth.types.AuthContext, value: dict):
    namespace = tuple(value["namespace"] or ())
    value["namespace"] = (ctx.user.identity, *namespace)
