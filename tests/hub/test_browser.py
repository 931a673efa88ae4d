"""The pages in a real browser: what a hostile card carries does nothing there. Skipped where there is no Chromium."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hubforge.hub import LocalHub

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

# Each would mark the document or call the listener, were it run or fetched. AWAY is the listener's address.
HOSTILE = """\
<script>document.title = "pwned"; document.documentElement.dataset.pwned = "1"; fetch("AWAY/script")</script>
<img src=x onerror="document.documentElement.dataset.pwned = 1; fetch('AWAY/onerror')">
<svg onload="document.documentElement.dataset.pwned = 1"><script>fetch("AWAY/svg")</script></svg>
<iframe srcdoc="<script>parent.document.title = 'pwned'</script>" src="AWAY/frame"></iframe>
<object data="AWAY/object"></object><embed src="AWAY/embed"><link rel=stylesheet href="AWAY/css">
<style>body { display: none; background: url(AWAY/style) }</style>
<div style="position: fixed; inset: 0; background: url(AWAY/inline)">cover</div>
<meta http-equiv="refresh" content="0;url=AWAY/refresh"><base href="AWAY/base/">
<details open ontoggle="document.documentElement.dataset.pwned = 1"><summary>x</summary></details>
<video src="AWAY/video" autoplay onerror="document.documentElement.dataset.pwned = 1"></video>
<form action="AWAY/form"><input name=a autofocus onfocus="document.documentElement.dataset.pwned = 1"></form>
<math><mtext></p><img src=x onerror="document.documentElement.dataset.pwned = 1"></math>
<noscript><p title="</noscript><img src=x onerror=document.documentElement.dataset.pwned=1>"></noscript>
<a id="login" class="top" href="javascript:document.title='pwned'">a link</a> [b](javascript:alert(1))

![far](AWAY/picture.png) ![own](evil.svg)

```"><script>document.documentElement.dataset.pwned = 1</script>
code
```

End of the card.
"""
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>fetch("AWAY/own-svg")</script></svg>'
TITLE = "<img src=x onerror=document.documentElement.dataset.pwned=1>"


@pytest.fixture
def away() -> Iterator[tuple[str, list[str]]]:
    """Another host's address, and what was asked of it."""
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def dom(address: str, profile: Path) -> str:
    """The document as it is after everything that runs has run."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_browser_would_run_what_is_in_these_payloads(tmp_path: Path, away: tuple[str, list[str]]) -> None:
    """Else the next test could not fail."""
    address, asked = away
    (tmp_path / "bare.html").write_text(
        f"<title>x</title>{HOSTILE.replace('AWAY', address).replace('refresh', 'none')}"
    )
    assert "pwned" in dom((tmp_path / "bare.html").as_uri(), tmp_path / "chrome").partition("</head>")[0]
    assert asked


EVERYWHERE = ("/tree/main", "/blob/main/notes.md", "/commits/main", "/commit/SHA", "/resolve/main/evil.html")


@pytest.mark.parametrize(
    "pages",
    [("",), pytest.param((*EVERYWHERE, "/resolve/main/evil.svg"), marks=pytest.mark.slow)],
    ids=["card", "rest"],
)
def test_a_hostile_card_does_nothing(
    local_hub: LocalHub, api: HfApi, repo: str, tmp_path: Path, away: tuple[str, list[str]], pages: tuple[str, ...]
) -> None:
    address, asked = away
    hostile = HOSTILE.replace("AWAY", address)
    card = f"---\nlicense: mit\ntags: ['{TITLE}']\n---\n{hostile}"
    files = {"README.md": card, "evil.svg": SVG.replace("AWAY", address), "evil.html": hostile, "notes.md": hostile}
    adds = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
    sha = api.create_commit(repo, adds, commit_message=TITLE, commit_description=hostile).oid
    for page in pages:
        found = dom(f"{local_hub.endpoint}/{repo}{page.replace('SHA', sha)}", tmp_path / "chrome")
        assert "data-pwned" not in found.partition(">")[0] + found[:200], page
        assert "<title>pwned" not in found, page
        if page == "":
            assert "End of the card." in found
    assert asked == []
