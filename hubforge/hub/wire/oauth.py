"""Keyless publishing: a CI job's identity token becomes a short-lived token for one repository.

Source: RFC 8693 (token exchange), as https://huggingface.co/docs/hub/trusted-publishers has it: the identity token's
audience is the Hub's address, its claims match a trusted publisher's exactly, and what does not is `invalid_grant`.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hubforge.hub.oidc import claims_of
from hubforge.hub.refusal import Refusal
from hubforge.hub.tokens import split_name
from hubforge.hub.wire.access import publisher_token
from hubforge.hub.wire.request import body, endpoint, text_of

_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"
_LIMIT = 64 << 10


async def token(request: Request) -> Response:
    """The form RFC 8693 asks for, or the JSON the client sends."""
    data = await body(request, _LIMIT)
    try:
        if request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            fields: Any = {key: values[0] for key, values in parse_qs(data.decode()).items()}
        else:
            fields = json.loads(data)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise _refusal("invalid_request", "The request is neither a form nor a JSON object")
    return await run_in_threadpool(_exchange, request, fields)


def _exchange(request: Request, fields: dict[str, Any]) -> Response:
    if fields.get("grant_type") != _EXCHANGE:
        raise _refusal("unsupported_grant_type", f"Only {_EXCHANGE} is offered")
    if fields.get("subject_token_type") != _ID_TOKEN:
        raise _refusal("invalid_request", f"subject_token_type must be {_ID_TOKEN}")
    resource, settings = text_of(fields, "resource"), request.app.state.settings
    try:
        claims = claims_of(text_of(fields, "subject_token"), settings.issuers, audience=endpoint(request))
    except ValueError as error:
        raise _refusal("invalid_grant", f"The identity token is not accepted: {error}") from None
    publisher = next(
        (
            each
            for each in settings.publishers
            if each.repo == resource
            and each.issuer == claims["iss"]
            and all(claims.get(name) == value for name, value in each.claims.items())
        ),
        None,
    )
    if publisher is None:
        # The same for a repository that is not there: who may not publish learns nothing of it.
        raise _refusal("invalid_grant", f"No trusted publisher of {resource!r} matches the claims of this job")
    try:
        request.app.state.shelf.get(*split_name(resource))
    except Refusal:
        raise _refusal("invalid_grant", f"{resource} does not exist yet: create it once with an access token") from None
    seconds = settings.publisher_seconds
    made = publisher_token(request.app.state.signer, publisher, str(claims["sub"]), seconds)
    return JSONResponse(
        {
            "access_token": made,
            "token_type": "bearer",
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
            "expires_in": seconds,
        },
        headers={"Cache-Control": "no-store"},
    )


def _refusal(code: str, description: str) -> Refusal:
    return Refusal(400, description, more={"error": code, "error_description": description})


routes = [Route("/oauth/token", token, methods=["POST"])]
