"""`verify`: passes on what was published, and names every file that is not as the release file says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from hubforge.errors import PublishError, VerifyError
from hubforge.events import Event, Progress, silent
from hubforge.hub import LocalHub
from hubforge.publish._front_matter import front_matter_faults
from hubforge.publish.hub import push
from hubforge.publisher import Hub, Upload, UploadFile
from hubforge.release import MetricRecord, Release, SourceRecord, TargetRecord
from hubforge.verify import verify
from tests.fixtures_publish import MakeUpload, Requests, digest

BIG = b"w" * 5000  # large enough for large-file storage in the `hub_of_me` fixture


@pytest.fixture
def hub(hub_of_me: Hub, lfs_transport: None) -> Hub:
    return hub_of_me


def by_hand(hub: Hub, *operations: CommitOperationAdd | CommitOperationDelete) -> None:
    HfApi(hub.endpoint, token=hub.token).create_commit("me/model", list(operations), commit_message="by hand")


def fault_of(hub: Hub, **options: object) -> str:
    """What verify says is wrong."""
    with pytest.raises(VerifyError) as caught:
        verify("me/model", hub, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_what_was_published_verifies(hub: Hub, make_upload: MakeUpload) -> None:
    upload = make_upload({"model.safetensors": BIG, "config.json": b"{}"}, tag="v1.0")
    told = push(upload, hub, silent)
    report = verify("me/model", hub, revision="v1.0", deep=False)
    listed = [file for file in upload.files if file.path not in ("hubforge.release.json", "SHA256SUMS")]
    assert report.commit == told["commit"] and report.unlisted == ()
    assert report.files == 3 and report.bytes == sum(file.size for file in listed)
    (root,) = report.folders
    assert (root.folder, root.name, root.by_hub, root.downloaded, root.notes) == (None, "test", 1, 2, ())
    assert json.loads(json.dumps(report.as_json()))["files"] == 3


def test_large_files_are_not_downloaded_unless_deep(hub: Hub, make_upload: MakeUpload, sent: Requests) -> None:
    push(make_upload({"model.safetensors": BIG}), hub, silent)
    sent.clear()
    verify("me/model", hub, deep=False)
    assert not [line for line in sent if "model.safetensors" in line]
    heard: list[Event] = []
    report = verify("me/model", hub, deep=True, report=heard.append)
    assert [line for line in sent if "model.safetensors" in line]
    assert report.folders[0].downloaded == 2
    last = [event for event in heard if isinstance(event, Progress)][-1]
    assert last.done == last.total == report.bytes


@pytest.mark.parametrize(
    ("path", "content"), [("model.safetensors", BIG[:-1] + b"x"), ("config.json", b"[]")], ids=["large", "small"]
)
def test_one_other_byte_committed_is_named(hub: Hub, make_upload: MakeUpload, path: str, content: bytes) -> None:
    push(make_upload({"model.safetensors": BIG, "config.json": b"{}"}), hub, silent)
    by_hand(hub, CommitOperationAdd(path, content))
    text = fault_of(hub, deep=False)
    assert "1 thing is not as the release file says" in text
    assert f"{path}: sha256" in text and digest(content) in text


def test_one_other_byte_on_the_hubs_disk_is_named(hub: Hub, make_upload: MakeUpload, tmp_path: Path) -> None:
    push(make_upload({"model.safetensors": BIG}), hub, silent)
    (stored,) = [path for path in (tmp_path / "hub").rglob(digest(BIG)) if path.is_file()]
    stored.chmod(0o644)
    stored.write_bytes(BIG[:-1] + b"x")
    assert "model.safetensors: sha256 of its content is" in fault_of(hub)
    verify("me/model", hub, deep=False)  # the Hub still tells the old digest: only a download can show it


def test_everything_wrong_is_named_at_once(hub: Hub, make_upload: MakeUpload) -> None:
    push(make_upload({"model.safetensors": BIG, "config.json": b"{}", "vocab.json": b"[1]"}), hub, silent)
    by_hand(
        hub,
        CommitOperationDelete("model.safetensors"),
        CommitOperationAdd("config.json", b"{ }"),
        CommitOperationAdd("vocab.json", b"[2]"),
    )
    text = fault_of(hub)
    assert "3 things are not as the release file says" in text
    assert "model.safetensors: missing" in text
    assert "config.json: 3 bytes, but the release has 2" in text
    assert "vocab.json: sha256 of its content is" in text


def test_files_of_others_are_listed_and_are_no_fault(hub: Hub, make_upload: MakeUpload) -> None:
    push(make_upload({"config.json": b"{}"}), hub, silent)
    by_hand(hub, CommitOperationAdd("notes.md", b"x"))
    assert verify("me/model", hub).unlisted == ("notes.md",)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"", "SHA256SUMS: does not list config.json"),
        (b"nonsense\n", "SHA256SUMS: line 1 is not"),
        (b"\xff\n", "SHA256SUMS: 'utf-8' codec can't decode"),
        (b"0" * 64 + b"  evil.bin\n", "SHA256SUMS: lists evil.bin, which the release does not"),
        (b"0" * 64 + b"  config.json\n", "SHA256SUMS: has another sha256 for config.json than the release"),
        (b"0" * 64 + b"  hubforge.release.json\n", "has another sha256 for hubforge.release.json than the one"),
    ],
)
def test_checksums_that_say_something_else_are_a_fault(
    hub: Hub, make_upload: MakeUpload, text: bytes, fault: str
) -> None:
    push(make_upload({"config.json": b"{}"}), hub, silent)
    by_hand(hub, CommitOperationAdd("SHA256SUMS", text))
    assert fault in fault_of(hub)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"not json", "hubforge.release.json is not a release file: Invalid JSON"),
        (b"[" * 1_000_000, "hubforge.release.json is not a release file: Invalid JSON: recursion limit"),
        (b"{}", "hubforge.release.json is not a release file: hubforge: Field required"),
        (
            b'{"hubforge": "1", "name": "x", "recipe_file": "x", "recipe": "x"}',
            "hubforge.release.json says nothing of this repository",
        ),
    ],
    ids=["not JSON", "nested", "incomplete", "of nothing"],
)
def test_a_release_file_that_cannot_be_used_says_so(
    hub: Hub, make_upload: MakeUpload, content: bytes, fault: str
) -> None:
    push(make_upload({"config.json": b"{}"}), hub, silent)
    by_hand(hub, CommitOperationAdd("hubforge.release.json", content))
    assert fault in fault_of(hub)


def test_a_release_file_may_not_list_paths_that_leave_the_repository(hub: Hub, make_upload: MakeUpload) -> None:
    upload = make_upload({"config.json": b"{}"})
    push(upload, hub, silent)
    text = next(file.content for file in upload.files if file.path == "hubforge.release.json")
    assert isinstance(text, bytes)
    by_hand(hub, CommitOperationAdd("hubforge.release.json", text.replace(b'"config.json"', b'"../\\u001b[2Jx"')))
    fault = fault_of(hub)
    assert "\x1b" not in fault and "the release file lists it, but it holds a backslash or a control" in fault


def test_a_release_file_that_never_ends_is_not_read_to_its_end(
    hub: Hub, make_upload: MakeUpload, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(make_upload({"config.json": b"{}"}), hub, silent)
    by_hand(hub, CommitOperationAdd("hubforge.release.json", b" " * 100_000))
    monkeypatch.setattr("hubforge.verify.RELEASE_LIMIT", 50_000)
    assert "hubforge.release.json is larger than 50,000 bytes" in fault_of(hub)


def test_every_folder_of_a_mask_repository_is_verified_and_the_shared_card_with_the_latest(
    hub: Hub, make_upload: MakeUpload
) -> None:
    one = "---\nlicense: mit\n---\n# One\n"
    both = "---\nlicense: mit\n---\n# Both\n"
    push(make_upload({"fisher.safetensors": BIG}, folder="one", card=one), hub, silent)
    push(make_upload({"fisher.safetensors": BIG + b"2"}, folder="two", card=both), hub, silent)
    report = verify("me/model", hub)
    assert [(check.folder, check.files) for check in report.folders] == [("one", 2), ("two", 2)]
    assert report.folders[0].notes == ("README.md is of a later release to another folder",)
    assert verify("me/model", hub, folder="two").folders[0].notes == ()
    by_hand(hub, CommitOperationAdd("one/fisher.safetensors", BIG + b"x"), CommitOperationAdd("README.md", b"x"))
    text = fault_of(hub)
    assert "one/fisher.safetensors: 5,001 bytes, but the release has 5,000" in text
    assert "README.md: 1 bytes" in text and "2 things are" in text
    verify("me/model", hub, folder="two")


def test_a_shared_card_that_no_release_lists_is_no_stranger(hub: Hub, make_upload: MakeUpload) -> None:
    files = {file.path: file for file in make_upload({"fisher.safetensors": BIG}, folder="one").files}
    record = json.loads(files["one/hubforge.release.json"].content)  # type: ignore[arg-type]
    record["targets"][0]["files"] = [one for one in record["targets"][0]["files"] if one["path"] != "README.md"]
    text = json.dumps(record).encode()
    files["one/hubforge.release.json"] = UploadFile("one/hubforge.release.json", text, len(text), digest(text))
    sums = f"{digest(BIG)}  fisher.safetensors\n".encode()
    files["one/SHA256SUMS"] = UploadFile("one/SHA256SUMS", sums, len(sums), digest(sums))
    push(Upload("masks", "me/model", tuple(files.values()), "m", "one"), hub, silent)
    by_hand(hub, CommitOperationAdd("notes.md", b"x"))
    report = verify("me/model", hub)
    assert report.files == 1 and report.unlisted == ("notes.md",)


def test_a_card_whose_front_matter_contradicts_the_release_is_a_fault(hub: Hub, make_upload: MakeUpload) -> None:
    push(make_upload({"config.json": b"{}"}, card="---\nlicense: apache-2.0\n---\n"), hub, silent)
    assert "README.md: says license 'apache-2.0', but the release has mit" in fault_of(hub)


def release(**fields: object) -> Release:
    known: dict[str, object] = {"hubforge": "1", "name": "x", "recipe_file": "x", "recipe": "x", "license": "gemma"}
    return Release.model_validate(known | fields)


@pytest.mark.parametrize(
    ("front", "fault"),
    [
        ("license: gemma", None),
        ("license: other\nlicense_name: gemma", None),
        ("license: other\nlicense_name: mine", "says license 'mine', but the release has gemma"),
        ("license: [gemma]", "says license a list, but the release has gemma"),
        ("license: gemma\nbase_model: google/base", None),
        ("license: gemma\nbase_model: [google/base, me/target]", None),
        ("license: gemma\nbase_model: [google/stated]", None),
        ("license: gemma\nbase_model: evil/base", "says base_model 'evil/base', which the release does not know"),
        ("license: gemma\nbase_model: [[x]]", "says base_model a list, which"),
        ("license: gemma\nbase_model_relation: clone", "says base_model_relation 'clone', but the Hub knows adapter"),
        ("license: &a gemma\nx: *a", "has front matter that cannot be read: it uses an alias"),
        ("license: " + "[" * 9999, "has front matter that cannot be read: maximum recursion depth"),
        ("- 1", "has front matter that is not a mapping"),
        ('x: !!int ""', "has front matter that cannot be read: '' is no int"),
        ("x: !!timestamp soon", "has front matter that cannot be read: 'soon' is no timestamp"),
        ("x: " + "y" * 200_000, "has front matter of 200,"),
    ],
)
def test_front_matter_against_the_release(front: str, fault: str | None) -> None:
    source = SourceRecord(name="a", kind="adapter", repo="google/base", facts={"base_model": "google/stated"})
    known = release(sources=[source], targets=[TargetRecord(name="t", kind="model", repo="me/target")])
    found = list(front_matter_faults(f"---\n{front}\n---\n# Title\n", known))
    assert len(found) == (fault is not None) and (fault is None or fault in found[0])


@pytest.mark.parametrize(("value", "right"), [("0.812346", True), ("0.82", False), ("yes", False)])
def test_results_of_a_card_are_those_that_were_measured(value: str, right: bool) -> None:
    known = release(metrics=[MetricRecord(eval="ifeval", on="healed", metric="acc", value=0.8123456)])
    metric = f"{{type: acc, value: {value}}}"
    card = f"---\nlicense: gemma\nmodel-index: [{{name: x, results: [{{metrics: [{metric}]}}]}}]\n---\n"
    assert (list(front_matter_faults(card, known)) == []) is right


def test_a_card_without_front_matter_is_a_fault() -> None:
    assert list(front_matter_faults("# Title\n", release())) == ["has no front matter between two lines of ---"]


def test_what_is_not_there_is_told_apart(hub: Hub, make_upload: MakeUpload) -> None:
    assert "the repository is empty, or not there, or hidden from this token" in fault_of(hub)
    push(make_upload({"config.json": b"{}"}), hub, silent)
    assert "there is no one/hubforge.release.json" in fault_of(hub, folder="one")
    with pytest.raises(PublishError, match="the Hub does not have it"):
        verify("me/model", hub, revision="v9")
    with pytest.raises(VerifyError, match="must be written namespace/name"):
        verify("model", hub)


def test_a_private_release_is_verified_only_by_its_owner(hub: Hub, make_upload: MakeUpload) -> None:
    push(make_upload({"config.json": b"{}"}, private=True), hub, silent)
    verify("me/model", hub)
    with pytest.raises((VerifyError, PublishError)):
        verify("me/model", Hub(hub.endpoint, "hf_somebodyelse"))


def test_a_release_without_a_token_on_a_public_repository_verifies(tmp_path: Path, make_upload: MakeUpload) -> None:
    with LocalHub(tmp_path / "open") as local:
        push(make_upload({"config.json": b"{}"}), Hub(local.endpoint, "hf_any"), silent)
        assert verify("me/model", Hub(local.endpoint, None)).files == 2


def test_a_copy_in_another_repository_verifies_with_a_note(hub: Hub, make_upload: MakeUpload) -> None:
    upload = make_upload({"config.json": b"{}"})
    push(Upload("weights", "me/copy", upload.files, "copied"), hub, silent)
    (root,) = verify("me/copy", hub).folders
    assert root.notes == ("was published to me/model; this is a copy",)


def test_a_download_that_is_dropped_goes_on_where_it_was(
    hub: Hub, make_upload: MakeUpload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer for the file is cut after a megabyte; the second must be asked for the rest only."""
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    data = hashlib.sha256(b"seed").digest() * (3 << 15)  # 3 MiB
    waits: list[float] = []
    monkeypatch.setattr("hubforge.publish._retry.time.sleep", waits.append)
    upload = make_upload({"model.safetensors": data})
    push(upload, hub, silent)
    ranges: list[str | None] = []

    class Cut(httpx2.SyncByteStream):
        def __init__(self, inner: httpx2.SyncByteStream) -> None:
            self.inner = inner

        def __iter__(self):  # type: ignore[no-untyped-def]
            given = 0
            for part in self.inner:
                yield part
                given += len(part)
                if given > 1 << 20:
                    raise httpx2.ReadError("connection reset")

    class Cutting(httpx2.Client):
        def send(self, request: httpx2.Request, **options: object) -> httpx2.Response:
            answer = super().send(request, **options)  # type: ignore[arg-type]
            if request.url.path.endswith("/model.safetensors"):
                ranges.append(request.headers.get("range"))
                if len(ranges) == 1:
                    answer.stream = Cut(answer.stream)  # type: ignore[arg-type]
            return answer

    set_client_factory(lambda: Cutting(follow_redirects=True))
    try:
        verify("me/model", hub, deep=True)
    finally:
        set_client_factory(default_client_factory)
    assert len(ranges) == 2 and ranges[0] is None
    start = int((ranges[1] or "").removeprefix("bytes=").removesuffix("-"))
    assert 1 << 20 <= start < len(data) and waits == [1.0]


def test_the_release_file_is_found_by_its_target_when_several_share_a_repository(hub: Hub) -> None:
    content = b"{}"
    card = b"---\nlicense: gemma\n---\n"
    files = [{"path": "config.json", "size": 2, "sha256": digest(content)}]
    files.append({"path": "README.md", "size": len(card), "sha256": digest(card)})
    both = release(
        targets=[
            {"name": "other", "kind": "model", "repo": "me/model", "files": []},
            {"name": "weights", "kind": "model", "repo": "me/model", "files": files},
        ],
        target="weights",
    )
    text = both.model_dump_json().encode()
    sums = f"{digest(content)}  config.json\n".encode()
    contents = {"config.json": content, "README.md": card, "hubforge.release.json": text, "SHA256SUMS": sums}
    uploads = tuple(UploadFile(path, data, len(data), digest(data)) for path, data in contents.items())
    push(Upload("weights", "me/model", uploads, "m"), hub, silent)
    assert verify("me/model", hub).files == 2
