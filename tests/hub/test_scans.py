"""What a scan is set to say is what the client hears."""

from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import get_session

from hubforge.hub import LocalHub


@pytest.fixture
def files(api: HfApi, repo: str) -> None:
    adds = [CommitOperationAdd("a.safetensors", b"\0"), CommitOperationAdd("evil.bin", b"\0evil")]
    api.create_commit(repo, adds, commit_message="files")


def statuses(api: HfApi, repo: str, repo_type: str = "model") -> dict[str, str | None]:
    found = api.list_repo_tree(repo, expand=True, repo_type=repo_type)
    return {file.path: file.security and file.security.status for file in found}


def test_a_hub_that_scans_nothing_says_nothing(api: HfApi, repo: str, files: None):
    assert set(statuses(api, repo).values()) == {None}
    assert api.model_info(repo, securityStatus=True).security_repo_status is None


def test_a_scan_goes_from_queued_to_its_findings(local_hub: LocalHub, api: HfApi, repo: str, files: None):
    local_hub.set_scan(repo, {"a.safetensors": "safe"}, done=False)
    assert statuses(api, repo) == {".gitattributes": "queued", "a.safetensors": "safe", "evil.bin": "queued"}
    assert api.model_info(repo, securityStatus=True).security_repo_status == {"scansDone": False, "filesWithIssues": []}
    local_hub.set_scan(repo, {"evil.bin": "unsafe"})
    assert statuses(api, repo) == {".gitattributes": "safe", "a.safetensors": "safe", "evil.bin": "unsafe"}
    (info,) = api.get_paths_info(repo, ["evil.bin"], expand=True)
    assert info.security and (info.security.safe, info.security.pickle_import_scan) == (False, {"status": "unsafe"})
    issues = [{"path": "evil.bin", "level": "unsafe"}]
    found = api.model_info(repo, securityStatus=True).security_repo_status
    assert found == {"scansDone": True, "filesWithIssues": issues}
    assert api.model_info(repo, expand=["securityRepoStatus"]).security_repo_status == found
    assert api.model_info(repo).security_repo_status is None  # Only who asks is told.
    page = get_session().get(f"{local_hub.endpoint}/{repo}/tree/main").text
    assert page.count('title="What a security scan says">unsafe') == 1
    local_hub.set_scan(repo, None)
    assert set(statuses(api, repo).values()) == {None}


def test_data_sets_are_scanned_too_and_statuses_are_checked(local_hub: LocalHub, api: HfApi):
    api.create_repo("me/data", repo_type="dataset")
    local_hub.set_scan("datasets/me/data", {})
    assert statuses(api, "me/data", "dataset") == {".gitattributes": "safe"}
    with pytest.raises(ValueError, match="'clean' is no status"):
        local_hub.set_scan("datasets/me/data", {"x": "clean"})
