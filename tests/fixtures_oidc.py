"""`github_oidc`: what GitHub Actions gives a job to prove itself with: an issuer, its keys, and the address to ask.

```python
def test_x(github_oidc, monkeypatch):
    settings = HubSettings(issuers={github_oidc.issuer: github_oidc.jwks}, publishers=(Publisher("me/model", {...}),))
    github_oidc.enter(monkeypatch, resource="me/model")  # Now this process is such a job.
```
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

ISSUER = "https://token.actions.githubusercontent.com"
REQUEST_TOKEN = "the-runner-s-own-secret"


@functools.cache
def private_key(algorithm: str, number: int) -> Any:
    """A key of that kind; the same for every test."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa  # Here: every test of the suite loads this file.

    if algorithm == "ES256":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public_jwk(algorithm: str, kid: str, number: int = 0) -> dict[str, Any]:
    import jwt

    kind = jwt.algorithms.ECAlgorithm if algorithm == "ES256" else jwt.algorithms.RSAAlgorithm
    public = kind.to_jwk(private_key(algorithm, number).public_key(), as_dict=True)
    return {**public, "kid": kid, "alg": algorithm, "use": "sig"}


class GitHubActions:
    """A runner of a job of `me/recipes`, on its branch main."""

    issuer = ISSUER

    def __init__(self) -> None:
        self.claims: dict[str, Any] = {  # As https://docs.github.com/actions/reference/openid-connect-reference.
            "sub": "repo:me/recipes:ref:refs/heads/main",
            "repository": "me/recipes",
            "repository_owner": "me",
            "repository_id": "74",
            "ref": "refs/heads/main",
            "ref_type": "branch",
            "event_name": "push",
            "workflow": "release",
            "job_workflow_ref": "me/recipes/.github/workflows/release.yml@refs/heads/main",
            "run_id": "30433642",
            "runner_environment": "github-hosted",
        }
        self.jwks = {"keys": [public_jwk("RS256", "rs"), public_jwk("ES256", "es")]}
        self.minted = 0  # How often a job asked.
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def mint(self, audience: str, *, algorithm: str = "RS256", kid: str | None = None, **claims: Any) -> str:
        """An identity token. claims: in place of the job's own; None leaves one out."""
        import jwt

        now = int(time.time())
        times = {"iat": now, "nbf": now - 5, "exp": now + 300, "jti": str(self.minted)}
        all_claims = {"iss": self.issuer, "aud": audience, **times, **self.claims, **claims}
        whole = {name: value for name, value in all_claims.items() if value is not None}
        key = private_key(algorithm, 0)
        return jwt.encode(whole, key, algorithm=algorithm, headers={"kid": kid or algorithm[:2].lower()})

    def enter(self, monkeypatch: pytest.MonkeyPatch, *, resource: str | None = None) -> None:
        """Make this process a job with `permissions: id-token: write`, and let go of tokens it had."""
        from huggingface_hub.utils import _auth

        address, port = self._server.server_address[:2]
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"http://{address!s}:{port}/token?api-version=2.0")
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", REQUEST_TOKEN)
        if resource:
            monkeypatch.setenv("HF_OIDC_RESOURCE", resource)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(_auth, "_OIDC_TOKEN_CACHE", None)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(github: GitHubActions) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            allowed = self.headers["Authorization"] == f"Bearer {REQUEST_TOKEN}"
            github.minted += allowed
            answer = {"value": github.mint(query.get("audience", ["https://github.com/me"])[0])} if allowed else {}
            data = json.dumps(answer).encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def github_oidc() -> Iterator[GitHubActions]:
    github = GitHubActions()
    yield github
    github.close()
