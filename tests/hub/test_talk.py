"""Pull requests and discussions, through the real client."""

from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError


def add(path: str, data: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, data)]


def test_a_commit_as_pull_request_reaches_main_when_it_is_merged(api: HfApi, repo: str):
    made = api.create_commit(repo, add("a.txt", b"1\n"), commit_message="Add a", create_pr=True)
    assert made.pr_num == 1 and made.pr_revision == "refs/pr/1"
    assert api.file_exists(repo, "a.txt", revision="refs/pr/1") and not api.file_exists(repo, "a.txt")
    details = api.get_discussion_details(repo, 1)
    assert details.is_pull_request and details.status == "open" and details.title == "Add a"
    assert "+++ b/a.txt" in (details.diff or "") and "+1" in (details.diff or "")
    api.merge_pull_request(repo, 1)
    merged = api.get_discussion_details(repo, 1)
    assert merged.status == "merged" and merged.merge_commit_oid == api.model_info(repo).sha
    assert api.file_exists(repo, "a.txt")
    assert api.list_repo_commits(repo)[0].title == "Add a (#1)"


def test_a_draft_takes_commits_and_is_opened_before_it_is_merged(api: HfApi, repo: str):
    draft = api.create_pull_request(repo, title="A draft", description="why")
    assert draft.status == "draft"
    api.create_commit(repo, add("w.bin", b"\0"), commit_message="Add w", revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError, match="draft"):
        api.merge_pull_request(repo, 1)
    api.change_discussion_status(repo, 1, "open")
    api.merge_pull_request(repo, 1)
    assert api.file_exists(repo, "w.bin")
    with pytest.raises(HfHubHTTPError, match="merged"):
        api.merge_pull_request(repo, 1)


def test_main_moving_elsewhere_is_no_conflict_but_the_same_file_is(api: HfApi, repo: str):
    api.create_commit(repo, add("a.txt", b"1"), commit_message="pr1", create_pr=True)
    api.create_commit(repo, add("a.txt", b"2"), commit_message="pr2", create_pr=True)
    api.create_commit(repo, add("b.txt", b"2"), commit_message="main moves")
    api.merge_pull_request(repo, 1)
    assert api.list_repo_files(repo) == [".gitattributes", "a.txt", "b.txt"]
    assert api.get_discussion_details(repo, 2).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.merge_pull_request(repo, 2)


def test_talking(api: HfApi, repo: str):
    talk = api.create_discussion(repo, title="A question", description="Which licence?")
    api.comment_discussion(repo, talk.num, "Apache.")
    api.rename_discussion(repo, talk.num, "An answered question")
    api.change_discussion_status(repo, talk.num, "closed", comment="Done.")
    details = api.get_discussion_details(repo, talk.num)
    assert [event.type for event in details.events] == [
        "comment",
        "comment",
        "title-change",
        "comment",
        "status-change",
    ]
    assert (details.title, details.status) == ("An answered question", "closed")
    assert [each.num for each in api.get_repo_discussions(repo, discussion_status="closed")] == [talk.num]
    assert not list(api.get_repo_discussions(repo, discussion_status="open"))


def test_references_of_pull_requests_are_listed_only_when_asked(api: HfApi, repo: str):
    api.create_commit(repo, add("a.txt", b"1"), commit_message="pr1", create_pr=True)
    assert api.list_repo_refs(repo).pull_requests is None
    assert [each.ref for each in api.list_repo_refs(repo, include_pull_requests=True).pull_requests or []] == [
        "refs/pr/1"
    ]
