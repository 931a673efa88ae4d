"""Settings from files: JSON that a person writes. No message names a secret.

```
{"endpoint": "https://hub.example",
 "tokens": {"hf_abc": "ann",
            "hf_def": {"user": "bot", "role": "read", "orgs": ["team"]},
            "hf_ghi": {"user": "ann", "role": "fineGrained",
                       "scopes": [{"type": "model", "name": "ann/poet", "permissions": ["repo.write"]}]}},
 "issuers": {"https://token.actions.githubusercontent.com": "github-jwks.json"},
 "publishers": [{"repo": "ann/poet", "claims": {"repository": "ann/models", "ref": "refs/heads/main"}}],
 "commit_quota": {"number": 128, "seconds": 3600}}
```
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hubforge.errors import HubforgeError
from hubforge.hub.settings import HubSettings, Quota
from hubforge.hub.tokens import Publisher, Scope, Token

T = TypeVar("T")
_QUOTAS = ("api_quota", "resolve_quota", "commit_quota")


def read_tokens(path: Path) -> dict[str, Token | str]:
    """Tokens from a JSON file: `{"hf_abc": "ann", "hf_def": {"user": "bot", "role": "read", "orgs": ["team"]}}`."""
    mend = 'Write {"TOKEN": "USER"} or {"TOKEN": {"user": "USER", "role": "read", "orgs": []}}.'
    return _read(path, "file of tokens", mend, _tokens)


def read_settings(path: Path) -> HubSettings:
    """Everything of HubSettings from a JSON file. `issuers` may name files of keys (JWKS) beside it."""

    def build(data: dict[str, Any]) -> HubSettings:
        for key in _QUOTAS:
            if data.get(key) is not None:
                data[key] = _record(Quota, data[key])
        data["tokens"] = _tokens(data.get("tokens", {}))
        data["publishers"] = tuple(_record(Publisher, each) for each in data.get("publishers", ()))
        data["issuers"] = {
            issuer: keys if isinstance(keys, dict) else _read(path.parent / keys, "file of keys", "It is a JWKS.", dict)
            for issuer, keys in data.get("issuers", {}).items()
        }
        data["allowed_hosts"] = tuple(data.get("allowed_hosts", ()))
        return _record(HubSettings, data)

    names = ", ".join(field.name for field in dataclasses.fields(HubSettings))
    return _read(path, "file of settings", f"A JSON object with any of: {names}.", build)


def _read(path: Path, what: str, mend: str, build: Callable[[Any], T]) -> T:
    try:
        return build(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise HubforgeError(f"the {what} cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        # The cause may hold a secret: it is not shown, and not kept.
        raise HubforgeError(f"the {what} is not understood", where=str(path), mend=mend) from None


def _tokens(data: dict[str, Any]) -> dict[str, Token | str]:
    tokens: dict[str, Token | str] = {}
    for secret, value in data.items():
        if isinstance(value, dict):
            scopes = tuple(_scope(each) for each in value.get("scopes", ()))
            value = _record(Token, {**value, "scopes": scopes})
            if value.role not in ("read", "write", "fineGrained"):
                raise ValueError("a role that is none")
        elif not isinstance(value, str):
            raise TypeError("a token opens a user's name or an object")
        tokens[secret] = value
    return tokens


def _scope(data: dict[str, Any]) -> Scope:
    """Flat, or with an `entity` as whoami shows it."""
    entity = data.get("entity", data)
    return Scope(str(entity["type"]), str(entity["name"]), tuple(data["permissions"]))


def _record(kind: Callable[..., T], fields: dict[str, Any]) -> T:
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
