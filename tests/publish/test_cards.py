"""A push to a repository whose card people have edited: the real client, real HTTP, the embedded Hub."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hubforge.errors import PublishError, VerifyError
from hubforge.events import silent
from hubforge.publish.hub import plan_push, push
from hubforge.publisher import Hub
from hubforge.sections import wrap
from hubforge.verify import verify
from tests.fixtures_publish import MakeUpload, Requests
from tests.publish.test_push import commits, files_at, foreign_commit

FRONT = "---\nlicense: mit\ntags:\n- hubforge\n---\n"


def card(number: int, front: str = FRONT) -> str:
    return front + "\n" + wrap("title", f"# Poet {number}") + "\n" + wrap("results", f"Results of {number}")


@pytest.fixture(autouse=True)
def lfs(lfs_transport: None) -> None:
    """The test's own commits go through LFS too."""


def edit(hub: Hub, old: str, new: str) -> str:
    """Somebody changes the card on the Hub; the whole card as it then is."""
    there = files_at(hub)["README.md"].decode()
    assert old in there
    foreign_commit(hub, "README.md", there.replace(old, new, 1).encode())
    return there.replace(old, new, 1)


def test_what_people_wrote_stays_and_the_sections_are_of_the_new_release(hub: Hub, make_upload: MakeUpload) -> None:
    push(make_upload({"a.json": b"1"}, card=card(1)), hub, silent)
    edit(hub, "<!-- hubforge:results", "Loved by all.\n\n<!-- hubforge:results")
    edit(hub, "- hubforge\n", "- hubforge\n- poems\n")
    second = make_upload({"a.json": b"2"}, card=card(2))
    found = plan_push(second, hub)
    changed = [line for line in found.card_diff.split("\n")[2:] if line[:1] in "+-" and "<!--" not in line]
    assert changed == ["-# Poet 1", "+# Poet 2", "-Results of 1", "+Results of 2"]
    push(second, hub, silent)
    there = files_at(hub)["README.md"].decode()
    assert "# Poet 2" in there and "Results of 2" in there and "Poet 1" not in there
    assert "Loved by all." in there and "- poems\n" in there
    assert verify("me/model", hub).folders[0].notes == (
        "README.md holds text between the sections that the release does not vouch for",
    )


def test_no_change_is_no_commit_with_text_of_people_too(hub: Hub, make_upload: MakeUpload, sent: Requests) -> None:
    upload = make_upload({"a.json": b"1"}, card=card(1), tag="v1.0")
    push(upload, hub, silent)
    edit(hub, "<!-- hubforge:results", "Loved by all.\n\n<!-- hubforge:results")
    before = commits(hub)
    sent.clear()
    assert push(upload, hub, silent)["pushed"] == []
    assert len(sent) == 5 and not [line for line in sent if not line.startswith("GET")]
    assert commits(hub) == before and plan_push(upload, hub).changes is False


def test_an_edited_section_stops_the_push_with_a_diff_before_anything_is_sent(
    hub: Hub, make_upload: MakeUpload, sent: Requests
) -> None:
    push(make_upload({"a.json": b"1"}, card=card(1)), hub, silent)
    edited = edit(hub, "Results of 1", "Best results ever")
    upload = make_upload({"a.json": b"2"}, card=card(2))
    sent.clear()
    with pytest.raises(PublishError) as caught:
        push(upload, hub, silent)
    text = str(caught.value)
    assert "the section results was edited by hand" in text and "-Best results ever\n+Results of 2" in text
    assert "--take ours" in text and not [line for line in sent if not line.startswith("GET")]
    with pytest.raises(VerifyError, match="the section results is not as it was published"):
        verify("me/model", hub)
    push(replace(upload, take="theirs"), hub, silent)
    assert "Best results ever" in files_at(hub)["README.md"].decode()
    assert verify("me/model", hub).folders[0].notes == ("README.md: the section results is kept by hand",)
    assert push(upload, hub, silent)["pushed"] == []  # settled: nobody is asked again
    foreign_commit(hub, "README.md", edited.encode())
    push(replace(upload, take="ours"), hub, silent)
    assert files_at(hub)["README.md"].decode() == card(2)


def test_an_edit_that_comes_while_we_push_is_not_lost(hub: Hub, make_upload: MakeUpload, sent: Requests) -> None:
    """The card is merged again, on top of what is there when the commit is refused as stale."""
    push(make_upload({"a.json": b"1"}, card=card(1)), hub, silent)
    done = []

    def write() -> None:
        if not done:
            done.append(edit(hub, "<!-- hubforge:results", "Just in time.\n\n<!-- hubforge:results"))

    sent.then(lambda request: request.url.path.endswith("/preupload/main"), write)
    push(make_upload({"a.json": b"2"}, card=card(2)), hub, silent)
    there = files_at(hub)["README.md"].decode()
    assert done and "Just in time." in there and "Results of 2" in there
    assert len([line for line in sent if line.startswith("POST") and "/commit/" in line]) >= 2


def test_pruning_deletes_only_what_it_was_told_and_never_what_another_release_vouches_for(
    hub: Hub, make_upload: MakeUpload
) -> None:
    push(make_upload({"a.json": b"1", "old.json": b"1"}, card=card(1)), hub, silent)
    push(make_upload({"m.json": b"1"}, folder="masks", card=card(1)), hub, silent)
    for path in ("notes.md", "old.json", "masks/stray.txt", "extra/x.bin"):
        foreign_commit(hub, path, b"by hand")
    upload = make_upload({"a.json": b"1"}, card=card(1))
    found = plan_push(upload, hub)
    assert (found.foreign, found.kept) == (("extra/x.bin", "notes.md"), ("old.json",))
    assert found.prunable == ("extra/x.bin", "notes.md", "old.json") and found.deleted == ()
    asked = replace(upload, prune=frozenset({"notes.md", "old.json", "masks/stray.txt", ".gitattributes"}))
    assert plan_push(asked, hub).pruned == ("notes.md", "old.json")
    assert sorted(push(asked, hub, silent)["deleted"]) == ["notes.md", "old.json"]
    assert {"extra/x.bin", "masks/m.json", "masks/stray.txt"} <= files_at(hub).keys()
    inside = make_upload({"m.json": b"1"}, folder="masks", card=card(1))
    assert plan_push(inside, hub).foreign == ("masks/stray.txt",)


def test_a_plan_says_what_a_gitignore_would_keep_out(hub: Hub, make_upload: MakeUpload) -> None:
    push(make_upload({"a.json": b"1"}, card=card(1)), hub, silent)
    HfApi(hub.endpoint, token=hub.token).create_commit(
        "me/model", [CommitOperationAdd(".gitignore", b"*.log\n")], commit_message="by hand"
    )
    found = plan_push(make_upload({"a.json": b"1", "x.log": b"1"}, card=card(1)), hub)
    assert found.ignored == ("x.log",) and "x.log" in [file.path for file in found.added]


def test_a_token_that_may_only_read_still_gets_a_plan(hub: Hub, make_upload: MakeUpload) -> None:
    push(make_upload({"a.json": b"1"}, card=card(1)), hub, silent)
    found = plan_push(make_upload({"a.json": b"2"}, card=card(1)), Hub(hub.endpoint, "hf_somebodyelse"))
    assert "a.json" in [file.path for file in found.replaced] and found.ignored == ()
