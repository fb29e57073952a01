"""Authentication that reads the body of each request."""

from __future__ import annotations

from langgraph_sdk import Auth

auth = Auth()


@auth.authenticate
async def authenticate(authorization: str | None, body: dict | None) -> Auth.types.MinimalUserDict:
    if not authorization:
        raise Auth.exceptions.HTTPException(status_code=401, detail="Who are you?")
    fields = sorted(body) if isinstance(body, dict) else []
    return {"identity": authorization.removeprefix("Bearer "), "fields": fields}
