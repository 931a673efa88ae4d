"""Each page: what it needs from a repository, handed to its template."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from hubforge.hub.names import KINDS, SINGULAR, is_name, kind_of
from hubforge.hub.pages import show
from hubforge.hub.pages.highlight import colours, highlight
from hubforge.hub.pages.markdown import render
from hubforge.hub.refusal import Refusal, no_entry
from hubforge.hub.storage import discussions
from hubforge.hub.storage.diffs import diff
from hubforge.hub.storage.facts import card_of, parameters_of
from hubforge.hub.storage.releases import releases_of
from hubforge.hub.storage.repository import HEADS, TAGS, Commit, Repository
from hubforge.hub.storage.scans import Scan
from hubforge.hub.storage.tree import Entry, Tree
from hubforge.hub.storage.uploadmode import is_text
from hubforge.hub.wire import collections
from hubforge.hub.wire.access import Access
from hubforge.hub.wire.request import COOKIE, access, body, endpoint, part, repository

_TEXT_LIMIT = 500_000
_PAGE = 50
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg")
_HERE = Path(__file__).parent
_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_templates.filters.update(
    size=show.size, count=show.count, ago=show.ago, moment=show.moment, address=show.address, segment=show.segment
)
View = Callable[[Request], Response]


def _answer(request: Request, template: str, code: int = 200, **values: Any) -> Response:
    pictures = "'self' data: https:" if request.app.state.settings.remote_images else "'self' data:"
    headers = {
        # Nothing may run on these pages, whatever got past the sanitiser.
        "Content-Security-Policy": (
            f"default-src 'none'; style-src 'self'; img-src {pictures}; media-src 'self'; form-action 'self'; "
            "base-uri 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    who = access(request)
    html = _templates.get_template(template).render(user=who.token.user if who.token else None, **values)
    return Response(html, code, headers, media_type="text/html; charset=utf-8")


def _page(view: View) -> View:
    """A view whose refusals are pages too."""

    @functools.wraps(view)
    def shown(request: Request) -> Response:
        try:
            return view(request)
        except Refusal as error:
            request.state.access = getattr(request.state, "access", Access(None))
            return _answer(request, "refusal.html", error.status, status=error.status, message=error.message)

    return shown


def _frame(repo: Repository, tab: str, commit: Commit | None = None, revision: str = "main") -> dict[str, Any]:
    """What every page of a repository shows."""
    refs = repo.refs()
    return {
        "repo": repo,
        "tab": tab,
        "commit": commit,
        "revision": revision,
        "visibility": repo.about()["visibility"],
        "gated": repo.about()["gated"],
        "branches": [name.removeprefix(HEADS) for name in refs if name.startswith(HEADS)],
        "notes": repo.tag_notes(),
        "tags": [name.removeprefix(TAGS) for name in refs if name.startswith(TAGS)],
        "talks": len(discussions.numbers(repo)),
    }


@_page
def index(request: Request) -> Response:
    """All repositories the asker may see, newest change first; those of one namespace below its name."""
    namespace = part(request, "ns") or None
    if namespace and not is_name(namespace):
        raise Refusal(404, "Nothing is here.")
    kinds = [kind for kind in KINDS if kind == namespace]
    wanted, who = request.query_params.get("q", "").strip().lower(), access(request)
    rows = []
    for repo in request.app.state.shelf.all(kinds[0] if kinds else None):
        if (namespace and not kinds and repo.namespace != namespace) or wanted not in repo.id.lower():
            continue
        if who.can_read(repo):
            head = repo.find("main")
            tree = repo.tree(head)
            rows.append((repo, head, show.facts(repo, tree, card_of(repo, tree).data)))
    lists = [] if kinds else _collections(request, lambda each: namespace in (None, each["owner"]))
    lists = [(each, number) for each, number in lists if wanted in each["title"].lower()]
    if namespace and not kinds and not rows and not lists:
        raise Refusal(404, f"{namespace} has no repositories here that you can see.")
    rows.sort(key=lambda row: row[1].date, reverse=True)
    return _answer(
        request, "index.html", rows=rows, lists=lists, query=wanted, namespace=namespace, endpoint=endpoint(request)
    )


def _collections(request: Request, wanted: Callable[[dict[str, Any]], bool]) -> list[tuple[dict[str, Any], int]]:
    """Collections the asker may see, each with the number of its items that they may see."""
    who = access(request)
    seen = [each for each in collections.shelf_of(request).all() if wanted(each) and collections.can_see(who, each)]
    return [(each, len(collections.visible_items(request, each))) for each in seen]


@_page
def collection(request: Request) -> Response:
    found = collections.found(request)
    shelf, items = request.app.state.shelf, []
    for item in collections.visible_items(request, found):
        link, facts, head = f"https://arxiv.org/abs/{item['id']}", None, None
        if item["type"] == "collection":
            link = f"/collections/{item['id']}"
        elif item["type"] != "paper":
            repo = shelf.get(kind_of(item["type"]), item["id"])
            head = repo.find("main")
            tree = repo.tree(head)
            link, facts = f"/{repo.name}", show.facts(repo, tree, card_of(repo, tree).data)
        items.append((item, link, facts, head))
    return _answer(request, "collection.html", found=found, items=items)


def style(request: Request) -> Response:
    sheet = (_HERE / "style.css").read_text(encoding="utf-8") + colours()
    return Response(
        sheet, media_type="text/css", headers={"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    )


@_page
def login_form(request: Request) -> Response:
    return _answer(request, "login.html", wrong=False, open=not request.app.state.settings.tokens)


async def login(request: Request) -> Response:
    """Keep the token in a cookie that opens pages and files, never writing."""
    from urllib.parse import parse_qs

    form = parse_qs((await body(request, 1 << 16)).decode("utf-8", "replace"))
    secret = form.get("token", [""])[0].strip()
    settings = request.app.state.settings
    if not settings.tokens:
        secret = "local"
    if settings.token(secret) is None:
        return await run_in_threadpool(_answer, request, "login.html", 401, wrong=True, open=False)
    answer = RedirectResponse("/", 303)
    answer.set_cookie(COOKIE, secret, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return answer


@_page
def card(request: Request) -> Response:
    repo = repository(request)
    commit = repo.find("main")
    tree = repo.tree(commit)
    read = card_of(repo, tree)
    html = render(read.body, repo.name, "main", remote_images=request.app.state.settings.remote_images)
    facts = show.facts(repo, tree, read.data)
    shelf, who = request.app.state.shelf, access(request)

    def home(id: str, kind: str) -> str:
        """A repository's address here if it is here, else on huggingface.co."""
        try:
            who.check(shelf, "datasets" if kind == "datasets" else "models", id)
        except Refusal:
            return f"https://huggingface.co/{'datasets/' if kind == 'datasets' else ''}{show.address(id)}"
        return f"/{'datasets/' if kind == 'datasets' else ''}{id}"

    return _answer(
        request, "card.html", html=html, facts=facts, home=home, endpoint=endpoint(request),
        lists=_collections(request, lambda each: _holds(each, repo)), releases=releases_of(repo, tree),
        **_frame(repo, "card", commit),
    )  # fmt: skip


def _holds(collection: dict[str, Any], repo: Repository) -> bool:
    return any((item["type"], item["id"]) == (SINGULAR[repo.kind], repo.id) for item in collection["items"])


@_page
def folder(request: Request) -> Response:
    repo = repository(request)
    revision = part(request, "rev")
    commit = repo.find(revision)
    tree = repo.tree(commit)
    path = part(request, "path").strip("/")
    try:
        paths = tree.below(path, recursive=False)
    except KeyError:
        raise no_entry(path) from None
    last = repo.last_changes(commit, paths)
    paths.sort(key=lambda each: (each in tree.files, each))
    rows = [(each, tree.files.get(each), last.get(each)) for each in paths]
    scan = Scan(repo)
    scans = {each: scan.status(each) for each in paths if each in tree.files} if scan else {}
    total = sum(entry.size for each, entry in tree.files.items() if not path or each.startswith(path + "/"))
    return _answer(
        request,
        "folder.html",
        path=path,
        rows=rows,
        total=total,
        scans=scans,
        **_frame(repo, "files", commit, revision),
    )


@_page
def blob(request: Request) -> Response:
    repo = repository(request)
    revision, path = part(request, "rev"), part(request, "path")
    commit = repo.find(revision)
    tree = repo.tree(commit)
    entry = tree.files.get(path)
    if entry is None:
        raise no_entry(path)
    text = lines = None
    refused = ""
    try:
        access(request).check_gate(repo)
    except Refusal as error:
        refused = error.message
    else:
        text = _text(repo, entry)
        lines = text.count("\n") + (not text.endswith("\n")) if text else 0
    return _answer(
        request, "blob.html", path=path, entry=entry, refused=refused, lines=lines,
        html=highlight(text, filename=path.rpartition("/")[2]) if text is not None else None,
        is_picture=path.lower().endswith(_PICTURES),
        parameters=parameters_of(repo, Tree({"x.safetensors": entry})) if path.endswith(".safetensors") else None,
        last=repo.last_changes(commit, [path]).get(path),
        **_frame(repo, "files", commit, revision),
    )  # fmt: skip


def _text(repo: Repository, entry: Entry) -> str | None:
    if entry.size > _TEXT_LIMIT or entry.sha256:
        return None
    data = repo.read(entry, _TEXT_LIMIT)
    return data.decode() if is_text(data, whole=True) else None


@_page
def history(request: Request) -> Response:
    repo = repository(request)
    revision = part(request, "rev")
    commits = list(repo.history(repo.find(revision)))
    start = request.query_params.get("p", "0")
    first = int(start) * _PAGE if start.isdigit() and len(start) < 7 else 0
    refs: dict[str, list[str]] = {}
    for name, id in repo.refs().items():
        refs.setdefault(id, []).append(name.removeprefix(HEADS).removeprefix(TAGS).removeprefix("refs/"))
    return _answer(
        request, "history.html", commits=commits[first : first + _PAGE], number=len(commits), named=refs,
        page=first // _PAGE, more=first + _PAGE < len(commits), **_frame(repo, "history", None, revision),
    )  # fmt: skip


@_page
def commit(request: Request) -> Response:
    repo = repository(request)
    access(request).check_gate(repo)
    seen = repo.find(part(request, "rev"))
    before = repo.tree(repo.commit(seen.parents[0])) if seen.parents else Tree({})
    changes = [change for change, _ in zip(diff(repo, before, repo.tree(seen)), range(100), strict=False)]
    return _answer(request, "commit.html", changes=changes, seen=seen, **_frame(repo, "history", seen, seen.id))


@_page
def discussion_list(request: Request) -> Response:
    repo = repository(request)
    found = [discussions.read(repo, number) for number in reversed(discussions.numbers(repo))]
    return _answer(request, "discussions.html", found=found, **_frame(repo, "talk"))


@_page
def discussion(request: Request) -> Response:
    repo = repository(request)
    found = discussions.read(repo, int(request.path_params["number"]))
    details = discussions.details(repo, found, with_diff=False)
    changes = []
    if found["pull_request"]:
        access(request).check_gate(repo)
        start, head = repo.commit(found["start"]), repo.commit(repo.refs()[f"refs/pr/{found['num']}"])
        changes = list(diff(repo, repo.tree(start), repo.tree(head)))[:100]
    said = [(event, _said(event, repo)) for event in details["events"]]
    return _answer(request, "discussion.html", found=details, said=said, changes=changes, **_frame(repo, "talk"))


def _said(event: dict[str, Any], repo: Repository) -> str | None:
    if event["type"] != "comment":
        return None
    return render(str(event["data"]["latest"]["raw"]), repo.name, "main")
