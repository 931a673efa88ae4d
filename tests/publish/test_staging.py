"""A release over several repositories: nothing is seen before all of it is verified, and what was cut short goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubforge.errors import PublishError, VerifyError
from hubforge.events import Event, Note, Warned, silent
from hubforge.hub import HubSettings, LocalHub, set_scan
from hubforge.publish._journal import Journal
from hubforge.publish._links import with_new_version
from hubforge.publish._plan import PushPlan, plan_push
from hubforge.publish._release import publish_release
from hubforge.publish._remote import Remote
from hubforge.publisher import Hub, Upload
from hubforge.publishing import siblings
from hubforge.release import Release
from tests.fixtures_publish import TOKEN, MakeUpload, Requests, json_answer

BIG = b"w" * 5000


@pytest.fixture(autouse=True)
def lfs(lfs_transport: None) -> None:
    """The test's own calls go through LFS too."""


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalHub]:
    tokens = {TOKEN: "me", "hf_other": "other"}
    with LocalHub(tmp_path / "hub", settings=HubSettings(tokens=tokens, lfs_from=2000)) as running:
        yield running


@pytest.fixture
def hub(local: LocalHub) -> Hub:
    return Hub(local.endpoint, TOKEN)


@pytest.fixture
def journal(tmp_path: Path, hub: Hub) -> Callable[[], Journal]:
    """The journal as a new process finds it."""
    return lambda: Journal(tmp_path / "journal.jsonl", hub)


@pytest.fixture
def two(make_upload: MakeUpload) -> Callable[..., list[Upload]]:
    """A release of two repositories whose files differ with the version."""

    def make(version: int, **more: object) -> list[Upload]:
        files = {"model.safetensors": BIG + bytes([version]), "config.json": b'{"v": %d}' % version}
        return [make_upload(files, repo=f"me/{name}", target=name, **more) for name in ("one", "two")]

    return make


def api(hub: Hub) -> HfApi:
    return HfApi(hub.endpoint, token=TOKEN)


def seen_by_others(hub: Hub) -> dict[str, str]:
    """What a stranger sees: the commit at main, of each public repository."""
    found = HfApi(hub.endpoint, token="hf_other").list_models(author="me")
    return {model.id: str(api(hub).model_info(model.id).sha) for model in found}


def titles(hub: Hub, repo: str = "me/one") -> list[str]:
    return [commit.title for commit in api(hub).list_repo_commits(repo)]


def pulls(hub: Hub, repo: str = "me/one") -> list[str]:
    return [one.status for one in api(hub).get_repo_discussions(repo)]


def test_new_repositories_are_hidden_until_all_are_verified(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], sent: Requests
) -> None:
    looks: list[dict[str, str]] = []
    sent.then(lambda request: "/me/two/commit/" in request.url.path, lambda: looks.append({}))
    commits = publish_release(two(1, tag="v1"), hub, silent, journal())
    lines = [line.split("?")[0] for line in sent]
    opened = [index for index, line in enumerate(lines) if line.startswith("PUT") and line.endswith("/settings")]
    verified = [
        index for index, line in enumerate(lines) if line == "GET /api/models/me/two/tree/" + commits[1]["commit"]
    ]
    assert len(opened) == 2 and min(opened) > min(verified)
    assert seen_by_others(hub) == {"me/one": commits[0]["commit"], "me/two": commits[1]["commit"]}
    assert all(one["private"] is False and one["created"] is True for one in commits)


def test_existing_repositories_are_staged_in_pull_requests_and_merged_together(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], sent: Requests
) -> None:
    publish_release(two(1), hub, silent, journal())
    sent.clear()
    publish_release(two(2), hub, silent, journal())
    order = [line.rpartition("/")[2] for line in sent if "create_pr" in line or line.endswith("/merge")]
    assert order == ["main?create_pr=1", "main?create_pr=1", "merge", "merge"]
    assert pulls(hub) == pulls(hub, "me/two") == ["merged"]
    assert titles(hub)[0] == "Publish test (#1)"
    assert api(hub).hf_hub_download("me/one", "config.json") and json.loads(
        Path(api(hub).hf_hub_download("me/one", "config.json")).read_text()
    ) == {"v": 2}


def test_an_unchanged_release_makes_no_commit_no_pull_request_and_at_most_three_requests_each(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], sent: Requests
) -> None:
    release = [replace(upload, collection="Ours") for upload in two(1, tag="v1")]
    publish_release(release, hub, silent, journal())
    before = titles(hub), pulls(hub)
    sent.clear()
    publish_release(release, hub, silent, journal())
    requests = list(sent)
    assert [line for line in requests if not line.startswith("GET")] == []
    assert all(len([line for line in requests if repo in line]) <= 3 for repo in ("/me/one/", "/me/two/"))
    assert len(requests) <= 6 and (titles(hub), pulls(hub)) == before


def test_a_wrong_tree_in_one_repository_leaves_all_as_they_were_and_says_what_differs(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], sent: Requests
) -> None:
    publish_release(two(1), hub, silent, journal())
    before = seen_by_others(hub)
    staged: list[int] = []
    sent.then(lambda request: "/me/two/commit/" in request.url.path, lambda: staged.append(1))
    sent.answer(lambda request: bool(staged) and "/tree/" in request.url.path, json_answer(200, []))
    with pytest.raises(VerifyError, match=r"config\.json: missing") as caught:
        publish_release(two(2), hub, silent, journal())
    assert "Nothing was published: main is as it was." in str(caught.value)
    assert seen_by_others(hub) == before and titles(hub) == ["Publish test", "initial commit"]
    assert pulls(hub, "me/two") == ["closed"] and pulls(hub) == ["open"]
    publish_release(two(2), hub, silent, journal())
    assert pulls(hub) == ["merged"]  # the one that was good, and that the failure left


def test_a_release_given_up_is_closed_by_the_next(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubforge.publish._staging import Staging

    publish_release(two(1), hub, silent, journal())
    with monkeypatch.context() as cut:
        cut.setattr(Staging, "promote", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
        for version in (2, 2):
            with pytest.raises(KeyboardInterrupt):
                publish_release(two(version), hub, silent, journal())
    assert pulls(hub) == ["open"]  # the second found the first's
    publish_release(two(3), hub, silent, journal())
    assert pulls(hub) == ["merged", "closed"]


def test_another_machine_finds_what_was_staged_by_account_and_content(
    hub: Hub, two: Callable[..., list[Upload]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No journal at all: the pull request is ours because our account opened it, and fits because its files do."""
    from hubforge.publish._staging import Staging

    publish_release(two(1), hub, silent, Journal(None, hub))
    with monkeypatch.context() as cut:
        cut.setattr(Staging, "promote", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish_release(two(2), hub, silent, Journal(None, hub))
    heard: list[Event] = []
    publish_release(two(2), hub, heard.append, Journal(None, hub))
    assert pulls(hub) == ["merged"]
    assert "going on with refs/pr/1, which an earlier publish left" in [
        event.text for event in heard if isinstance(event, Note)
    ]


def test_a_strangers_pull_request_of_our_title_is_never_taken(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal]
) -> None:
    """Its author could push to it after it was verified."""
    publish_release(two(1), hub, silent, journal())
    stranger = HfApi(hub.endpoint, token="hf_other")
    stranger.upload_file(
        path_or_fileobj=b"evil", path_in_repo="x.bin", repo_id="me/one", commit_message="Publish test", create_pr=True
    )
    publish_release(two(2), hub, silent, journal())
    assert pulls(hub) == ["merged", "open"]
    assert not api(hub).file_exists("me/one", "x.bin")


def test_a_killed_publish_of_a_new_repository_is_finished_and_then_public(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubforge.publish import _staging

    with monkeypatch.context() as cut:
        cut.setattr(_staging, "set_private", lambda *rest, **named: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish_release(two(1), hub, silent, journal())
    assert seen_by_others(hub) == {} and titles(hub) == ["Publish test", "initial commit"]
    publish_release(two(1), hub, silent, journal())
    assert set(seen_by_others(hub)) == {"me/one", "me/two"} and titles(hub) == ["Publish test", "initial commit"]


def test_private_stays_private(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], sent: Requests
) -> None:
    """Whether the recipe says so, or the repository was made private by hand."""
    publish_release(two(1, private=True), hub, silent, journal())
    assert seen_by_others(hub) == {}
    publish_release(two(2), hub, silent, journal())  # the recipe changed its mind, but nobody made it public
    api(hub).create_repo("me/hand", private=True)
    assert seen_by_others(hub) == {}
    assert not [line for line in sent if line.startswith("PUT") and "/settings" in line]


def test_a_new_repository_that_somebody_else_filled_meanwhile_is_not_made_public(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubforge.publish import _staging

    with monkeypatch.context() as cut:
        cut.setattr(_staging, "set_private", lambda *rest, **named: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish_release(two(1), hub, silent, journal())
    api(hub).upload_file(path_or_fileobj=b"secret", path_in_repo="notes.md", repo_id="me/one")
    heard: list[Event] = []
    publish_release(two(1), hub, heard.append, journal())
    assert set(seen_by_others(hub)) == {"me/two"}
    told = [event.text for event in heard if isinstance(event, Warned)]
    assert told == ["it stays private: it holds files that this release did not put there (notes.md)"]
    publish_release(two(2), hub, silent, journal())
    assert set(seen_by_others(hub)) == {"me/two"}  # nor later


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_what_the_scan_calls_unsafe_is_not_published(
    hub: Hub, local: LocalHub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], existing: bool
) -> None:
    if existing:
        publish_release(two(1), hub, silent, journal())
    else:
        api(hub).create_repo("me/two")
    before = seen_by_others(hub)
    set_scan(local.folder, "me/two", {"model.safetensors": "unsafe", "README.md": "caution"})
    with pytest.raises(PublishError, match=r"security scan calls model\.safetensors unsafe"):
        publish_release(two(2), hub, silent, journal())
    assert seen_by_others(hub) == before and pulls(hub, "me/two") == ["closed"]
    set_scan(local.folder, "me/two", {})
    publish_release(two(2), hub, silent, journal())
    assert pulls(hub, "me/two")[0] == "merged"


def test_a_scan_that_is_pending_is_waited_for(
    hub: Hub,
    local: LocalHub,
    two: Callable[..., list[Upload]],
    journal: Callable[[], Journal],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish_release(two(1), hub, silent, journal())
    set_scan(local.folder, "me/two", {}, done=False)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            set_scan(local.folder, "me/two", {"config.json": "caution"})

    monkeypatch.setattr("hubforge.publish._retry.time.sleep", sleep)
    heard: list[Event] = []
    publish_release(two(2), hub, heard.append, journal())
    assert slept == [2.0, 4.0] and pulls(hub, "me/two") == ["merged"]
    assert "the Hub's security scan says caution of config.json" in [
        event.text for event in heard if isinstance(event, Warned)
    ]
    set_scan(local.folder, "me/two", {}, done=False)
    impatient = Hub(hub.endpoint, TOKEN, patience=10)
    with pytest.raises(PublishError, match="is not done after 6 s of waiting") as caught:
        publish_release(two(3), impatient, silent, journal())
    assert "--patience" in str(caught.value) and pulls(hub, "me/two") == ["open", "merged"]


def test_main_that_moves_between_staging_and_merging_is_staged_again(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubforge.publish._staging import Staging

    publish_release(two(1), hub, silent, journal())
    promote = Staging.promote

    def moved(self: Staging, remote: object) -> object:
        if self.job.repo == "me/one":
            api(hub).upload_file(path_or_fileobj=b"by hand", path_in_repo="notes.md", repo_id="me/one")
        return promote(self, remote)  # type: ignore[arg-type]

    monkeypatch.setattr(Staging, "promote", moved)
    publish_release(two(2), hub, silent, journal())
    assert pulls(hub) == ["merged", "closed"] and api(hub).file_exists("me/one", "notes.md")


def test_a_file_of_the_release_that_somebody_changed_meanwhile_stops_it(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubforge.publish._staging import Staging

    publish_release(two(1), hub, silent, journal())
    promote = Staging.promote

    def moved(self: Staging, remote: object) -> object:
        api(hub).upload_file(path_or_fileobj=b"theirs", path_in_repo="config.json", repo_id="me/one")
        return promote(self, remote)  # type: ignore[arg-type]

    release = two(1)[:1]
    changed = _only_model(two(2)[0], release[0])
    monkeypatch.setattr(Staging, "promote", moved)
    with pytest.raises(PublishError, match=r"somebody else published .* at the same time: config\.json"):
        publish_release([changed], hub, silent, journal())


def _only_model(new: Upload, old: Upload) -> Upload:
    """The new release, but with the old config.json."""
    config = next(file for file in old.files if file.path == "config.json")
    files = tuple(config if file.path == "config.json" else file for file in new.files)
    return Upload(new.target, new.repo, files, new.message)


def test_no_stage_commits_straight_to_main(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], sent: Requests
) -> None:
    publish_release(two(1), hub, silent, journal(), stage=False)
    publish_release(two(2), hub, silent, journal(), stage=False)
    assert pulls(hub) == [] and titles(hub) == ["Publish test", "Publish test", "initial commit"]
    assert not [line for line in sent if "/settings" in line]


def test_folders_of_one_repository_are_one_commit(
    hub: Hub, make_upload: MakeUpload, journal: Callable[[], Journal]
) -> None:
    def masks(version: int) -> list[Upload]:
        return [
            make_upload(
                {"mask.bin": bytes([version]) * 10}, repo="me/masks", folder=name, target=name, card=f"# {name}"
            )
            for name in ("a", "b")
        ]

    publish_release(masks(1), hub, silent, journal())
    results = publish_release(masks(2), hub, silent, journal())
    assert titles(hub, "me/masks") == ["Publish test (#1)", "Publish test", "initial commit"]
    assert [one["pushed"][0].partition("/")[0] for one in results] == ["a", "b"]
    assert Path(api(hub).hf_hub_download("me/masks", "README.md")).read_text() == "# b"


def test_two_publishers_of_one_release_at_once_make_one_commit_each_repository(
    hub: Hub, two: Callable[..., list[Upload]], tmp_path: Path, sent: Requests
) -> None:
    """From two stores: neither knows of the other but by what is on the Hub."""
    publish_release(two(1), hub, silent, Journal(None, hub))
    release = two(2)
    sent.then(
        lambda request: "create_pr" in str(request.url),
        lambda: publish_release(release, hub, silent, Journal(None, hub)) and None,
    )
    publish_release(release, hub, silent, Journal(None, hub))
    assert titles(hub)[0].startswith("Publish test") and len(titles(hub)) == 3
    assert len(titles(hub, "me/two")) == 3 and "open" not in pulls(hub)


def test_a_token_that_may_not_open_pull_requests_is_told_of_no_stage(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], sent: Requests
) -> None:
    publish_release(two(1), hub, silent, journal())
    sent.answer(lambda request: "create_pr" in str(request.url), json_answer(403, {"error": "Forbidden"}))
    with pytest.raises(PublishError, match="the token may not open a pull request") as caught:
        publish_release(two(2), hub, silent, journal())
    assert "--no-stage" in str(caught.value)


def test_the_links_are_made_once_all_is_public(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], sent: Requests
) -> None:
    api(hub).create_repo("me/old")
    card = "---\n# mine\nlicense: mit\ntags: [a]\n---\n# Old\n"
    api(hub).upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="me/old")
    release = [replace(upload, collection="Ours") for upload in two(1)]
    release[0] = replace(release[0], supersedes=("me/old",))
    publish_release(release, hub, silent, journal())
    (collection,) = api(hub).list_collections(owner="me")
    assert [item.item_id for item in collection.items] == ["me/one", "me/two"]
    text = Path(api(hub).hf_hub_download("me/old", "README.md")).read_text()
    assert text == card.replace("tags: [a]\n", "tags: [a]\nnew_version: me/one\n")
    first_link = next(index for index, line in enumerate(sent) if line == "POST /api/collections")
    last_opened = max(index for index, line in enumerate(sent) if line.startswith("PUT") and "/settings" in line)
    assert first_link > last_opened
    publish_release(release, hub, silent, Journal(None, hub))  # another machine: looks, and finds it done
    assert len(titles(hub, "me/old")) == 3


def links(found: PushPlan) -> tuple[str | None, list[str], bool]:
    data = found.as_json()
    return data["collection_change"], data["superseded"], data["changes"]


@pytest.mark.parametrize("by", ["title", "slug"])
def test_a_plan_shows_the_links_that_the_push_would_make(
    hub: Hub, two: Callable[..., list[Upload]], journal: Callable[[], Journal], sent: Requests, by: str
) -> None:
    old = api(hub)
    for name in ("me/old", "me/bare"):
        old.create_repo(name)
    old.upload_file(path_or_fileobj=b"# Old\n", path_in_repo="README.md", repo_id="me/old")
    publish_release(two(1), hub, silent, journal())
    slug = old.create_collection("Ours").slug if by == "slug" else "Ours"
    one, other = (replace(upload, collection=slug) for upload in two(1))
    one = replace(one, supersedes=("me/old", "me/bare"))

    def planned(upload: Upload, journal: Journal | None = None) -> PushPlan:
        sent.clear()
        return plan_push(upload, hub, journal=journal)

    planned(two(1)[0])
    plain = len(sent)
    found = planned(one, journal())
    assert links(found) == ("create" if by == "title" else "join", ["me/old", "me/bare"], True)
    assert not found.changes_files and len(sent) == plain + {"title": 2, "slug": 1}[by] + 2
    assert all(line.startswith("GET ") for line in sent)
    assert len(list(old.list_collections(owner="me"))) == (by == "slug")

    publish_release([one], hub, silent, journal())
    assert links(planned(one, journal())) == ("keep", [], False) and len(sent) == plain  # as the journal says
    assert links(planned(one)) == ("keep", [], False)  # as another machine sees it
    assert links(planned(other, journal())) == ("join", [], True)
    assert links(planned(replace(other, repo="me/new"))) == ("join", [], True)


def test_a_plan_names_links_that_cannot_be_made(hub: Hub, two: Callable[..., list[Upload]]) -> None:
    one = replace(two(1)[0], supersedes=("me/gone",))
    with pytest.raises(PublishError, match="`supersedes` names me/gone, which the Hub does not have"):
        plan_push(one, hub)
    assert plan_push(one, hub, coming=("me/gone",)).links.superseded == ("me/gone",)  # of the same release
    with pytest.raises(PublishError, match=r"cannot look at the collection 'me/x-0{24}': the Hub does not have it"):
        plan_push(replace(two(1)[0], collection="me/x-" + "0" * 24), hub)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("# Old\n", "---\nnew_version: me/new\n---\n# Old\n"),
        ("---\na: 1\n---\nx", "---\na: 1\nnew_version: me/new\n---\nx"),
        ("---\nnew_version: me/b # why\na: 1\n---\nx", "---\nnew_version: me/new\na: 1\n---\nx"),
        ("---\nnew_version: me/new\n---\nx", "---\nnew_version: me/new\n---\nx"),
        ("---\n---\nx\n---\ny", "---\nnew_version: me/new\n---\nx\n---\ny"),
    ],
    ids=["no front matter", "added", "replaced", "there", "empty"],
)
def test_new_version_is_one_line_of_the_front_matter(card: str, expected: str) -> None:
    assert with_new_version(card, "me/new") == expected


def test_front_matter_that_has_no_lines_is_left_to_its_author() -> None:
    with pytest.raises(PublishError, match="cannot be changed line by line"):
        with_new_version("---\n{a: 1}\n---\nx", "me/new")


def test_the_release_files_of_other_folders_are_read_once(
    hub: Hub, make_upload: MakeUpload, journal: Callable[[], Journal], sent: Requests, tmp_path: Path
) -> None:
    masks = [make_upload({"m.bin": b"1"}, repo="me/masks", folder=name, target=name) for name in "abc"]
    publish_release(masks, hub, silent, journal())
    record = next(file for file in masks[2].files if file.path == "c/hubforge.release.json")
    assert isinstance(record.content, bytes)
    release = Release.model_validate_json(record.content)
    for expected in (2, 0, 1):
        with Remote(hub, "me/masks") as remote:
            seen = remote.look()
            sent.clear()
            assert len(siblings(release, "c", remote, seen, tmp_path / "kept")) == 2
        assert len(sent) == expected
        some = next((tmp_path / "kept").iterdir())
        if expected == 0:
            some.write_bytes(b"spoilt")
