"""The pages: cards are shown without trusting them, and every page of a repository answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import get_session

from hubforge.hub import HubSettings, LocalHub
from hubforge.hub.pages.markdown import render
from hubforge.hub.pages.show import ago, count, size

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "<a href='jAvAsCrIpT:alert(1)'>a</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>a</a>",
    "<iframe src='https://x'></iframe>",
    "<style>body{display:none}</style>",
    "<div style='position:fixed'>x</div>",
    "<form action='/api'><input name=a></form>",
    "<svg><script>alert(1)</script></svg>",
    "<math><mtext></p><img src=x onerror=alert(1)></math>",
    "<base href='https://evil.example/'>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    '```x"><script>alert(1)</script>\ncode\n```',
    "<p class='top brand' id='login'>x</p>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'></noscript>",
    "# <img src=x onerror=alert(1)>",
    '![a"><script>alert(1)</script>](https://evil.example/x.png)',
]


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:24] for text in HOSTILE])
def test_what_could_run_or_deceive_is_taken_out(text: str):
    html = render(text, "me/model", "main")
    assert not re.search(r"<(script|iframe|style|form|input|base|meta|svg|object)\b|<[^>]*\s(on\w+|style)=", html, re.I)
    assert not re.search(r"(href|src)=\"\s*(javascript|data:text)", html, re.I)
    assert 'class="top' not in html and 'id="login"' not in html
    assert "evil.example" not in re.sub(r"&[^;]+;", "", " ".join(re.findall(r'src="[^"]*"', html)))


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("![x](a/b.svg)", '<img src="/me/model/resolve/main/a/b.svg" alt="x">'),
        ("![x](../../secret.svg)", '<span class="away" title="A picture elsewhere">x</span>'),
        ("![x](https://e.com/x.png)", '<span class="away" title="A picture elsewhere">x</span>'),
        ("[x](config.json#L1)", 'href="/me/model/blob/main/config.json#L1"'),
        ("[x](#how-it-was-made)", 'href="#h-how-it-was-made"'),
        ("## How it was `made`!", '<h2 id="h-how-it-was-made">'),
        ("|a|\n|--:|\n|1|", '<td class="al-right">1</td>'),
        ("> [!NOTE]\n> Mind.", '<blockquote class="alert alert-note">'),
        ("<details><summary>s</summary>\n\nx\n\n</details>", "<details><summary>s</summary>"),
        ("```python\nimport x\n```", '<span class="kn">import</span>'),
        ("[x](https://e.com)", 'href="https://e.com" rel="noopener noreferrer nofollow ugc"'),
    ],
)
def test_what_cards_are_made_of_is_shown(text: str, html: str):
    assert html in render(text, "me/model", "main")


def test_pictures_elsewhere_are_shown_when_the_host_allows_it():
    html = render("![x](https://e.com/x.png)", "me/model", "main", remote_images=True)
    assert '<img src="https://e.com/x.png" alt="x">' in html


def test_a_card_page_allows_no_script_and_no_other_host(local_hub: LocalHub, api: HfApi, repo: str):
    card = b"---\nlicense: mit\nbase_model: [me/model, org/else]\n---\n# Hi\n<script>alert(1)</script>![x](f.svg)"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    adds = [CommitOperationAdd("README.md", card), CommitOperationAdd("f.svg", svg)]
    api.create_commit(repo, adds, commit_message="card")
    page = get_session().get(f"{local_hub.endpoint}/{repo}")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy and "https:" not in policy
    assert "<script" not in page.text
    assert '<a href="/me/model" rel' in page.text  # A base model that is here,
    assert 'href="https://huggingface.co/org/else"' in page.text  # and one that is not.
    picture = get_session().get(f"{local_hub.endpoint}/{repo}/resolve/main/f.svg")
    assert picture.headers["content-type"] == "image/svg+xml"
    assert picture.headers["content-security-policy"].endswith("sandbox")
    assert picture.headers["x-content-type-options"] == "nosniff"


def test_html_in_a_repository_is_shown_as_text(local_hub: LocalHub, api: HfApi, repo: str):
    api.upload_file(path_or_fileobj=b"<script>alert(1)</script>", path_in_repo="x.html", repo_id=repo)
    answer = get_session().get(f"{local_hub.endpoint}/{repo}/resolve/main/x.html")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


def test_every_page_answers(local_hub: LocalHub, api: HfApi, repo: str):
    api.create_repo("me/data", repo_type="dataset")
    adds = [CommitOperationAdd("a b/c#d.py", b"import os\n"), CommitOperationAdd("w.bin", b"\0" * 2000)]
    sha = api.create_commit(repo, adds, commit_message="<b>bold</b>").oid
    api.create_tag(repo, tag="v1.0")
    api.create_commit(repo, [CommitOperationAdd("n.txt", b"x")], commit_message="pr", create_pr=True)
    wanted = {
        "/": "me/data",
        "/?q=mod": "model",
        "/me": "me/data",
        "/datasets": "me/data",
        "/me/model": "no card yet",
        "/datasets/me/data": "no card yet",
        "/me/model/tree/main": "2 kB",
        "/me/model/tree/v1.0/a%20b": "c#d.py",
        "/me/model/tree/refs%2Fpr%2F1": "n.txt",
        "/me/model/tree/refs/pr/1": "n.txt",
        "/me/model/blob/main/a%20b/c%23d.py": '<span class="kn">import</span>',
        "/me/model/blob/main/w.bin": "binary",
        "/me/model/commits/main": "&lt;b&gt;bold&lt;/b&gt;",
        f"/me/model/commit/{sha}": "+import os",
        "/me/model/discussions": "pull request",
        "/me/model/discussions/1": "+x",
        "/login": "no tokens",
        "/style.css": ".code .kn",
    }
    for path, text in wanted.items():
        answer = get_session().get(local_hub.endpoint + path)
        assert answer.status_code == 200, path
        seen = answer.text if path == "/style.css" else re.sub(r"</?(a|b|i|strong)\b[^>]*>", "", answer.text)
        assert text in seen, path


def test_what_is_missing_is_a_page_too(local_hub: LocalHub, repo: str):
    for path in (
        "/nobody",
        "/me/nothing",
        "/me/model/tree/nope",
        "/me/model/blob/main/nope",
        "/me/model/discussions/7",
    ):
        answer = get_session().get(local_hub.endpoint + path)
        assert answer.status_code in (401, 404) and answer.headers["content-type"].startswith("text/html"), path


def test_signing_in_shows_private_repositories(tmp_path: Path):
    with LocalHub(tmp_path, settings=HubSettings(tokens={"hf_a": "ann"})) as hub:
        hub.api("hf_a").create_repo("ann/secret", private=True)
        assert "secret" not in get_session().get(hub.endpoint).text
        browser = type(get_session())()  # Its own: it keeps the cookie.
        wrong = browser.post(f"{hub.endpoint}/login", data={"token": "x"})
        assert wrong.status_code == 401 and "set-cookie" not in wrong.headers
        right = browser.post(f"{hub.endpoint}/login", data={"token": "hf_a"})
        cookie = right.headers["set-cookie"]
        assert right.status_code == 303 and "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        assert "secret" in browser.get(hub.endpoint).text


def test_sizes_counts_and_times_as_people_read_them():
    assert [size(n) for n in (0, 999, 1000, 999_499, 1_500_000, 8_390_000_000)] == [
        "0 B", "999 B", "1 kB", "999 kB", "1.5 MB", "8.39 GB",
    ]  # fmt: skip
    assert [count(n) for n in (7, 1500, 4_190_000, 4_020_000_000)] == ["7", "1.5K", "4.19M", "4.02B"]
    assert ago(0).endswith("years ago")
