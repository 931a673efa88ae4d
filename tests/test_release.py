"""A whole release on tiny models: run, gates, cards, publish, verify, reproduce. The real client, over real HTTP."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from hubforge import recipe
from hubforge.errors import GateError, PublishError, SourceError, VerifyError
from hubforge.op import Settings
from hubforge.publisher import Hub
from hubforge.release import FILE_NAME, Release
from hubforge.reporters import Quiet
from hubforge.session import Session
from hubforge.store import LocalStore
from hubforge.verify import verify

TEXT = """\
name: tiny
license: apache-2.0
sources:
  base: {model: ./base}
  one: {adapter: ./one}
  two: {adapter: ./two}
stages:
  blend: {op: ties, adapters: [one, two], density: 0.5}
  merged: {op: apply, model: base, adapters: [blend]}
evals:
  style: {op: style, on: [merged], baseline: base, samples: 1, max_new_tokens: 8}
gates:
  - style.word_count >= 0
card: {title: Tiny, summary: A model for tests.}
publish:
  weights: {op: hub, repo: me/tiny, model: merged, tag: v1}
  adapter: {op: hub, repo: me/tiny-adapter, adapter: blend}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_llama, tiny_loras):
    """A folder with the recipe, its sources, and a store that the tests of this file share."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny_llama, folder / "base")
    shutil.copytree(tiny_loras["one"], folder / "one")
    shutil.copytree(tiny_loras["two"], folder / "two")
    (folder / "r.yaml").write_text(TEXT)
    return folder


@pytest.fixture
def session(project):
    def opened(text=TEXT):
        (project / "r.yaml").write_text(text)
        loaded = recipe.load(project / "r.yaml")
        return Session(
            loaded, LocalStore(project / "store"), Settings(device="cpu"), Quiet(), Hub("http://127.0.0.1:9")
        )

    return opened


@pytest.fixture
def hub(local_hub):
    return Hub(local_hub.endpoint, "local")


def test_a_run_gives_metrics_with_intervals_and_cards(session):
    outcome = session().run(None)
    found = {(record.on, record.metric): record for record in outcome.release.metrics}
    merged, base = found["merged", "word_count"], found["base", "word_count"]
    assert merged.baseline == "base"
    assert merged.difference == pytest.approx(merged.value - base.value)
    assert merged.difference_low <= merged.difference <= merged.difference_high
    assert merged.n == 10
    card = outcome.cards["weights"].read_text()
    assert "# Tiny" in card and "word_count" in card and "style.word_count >= 0" in card
    made = card.partition("(`apply`)")[2]  # Its own fields stand before those that every merge has.
    assert 0 < made.index("| `adapters` |") < made.index("| `rounding` |")


def test_a_failed_gate_says_by_how_much_and_stops(session):
    with pytest.raises(
        GateError, match=r"r.yaml:13: the gate 'style.word_count >= 1000' failed on merged: .* short by 99"
    ):
        session(TEXT.replace(">= 0", ">= 1000")).run(None)


def test_published_then_verified_then_unchanged(session, hub, local_hub, project):
    here = session()
    receipts = here.publish(here.run(None), hub, None)
    assert [receipt["repo"] for receipt in receipts] == ["me/tiny", "me/tiny-adapter"]
    api = local_hub.api()
    assert [tag.name for tag in api.list_repo_refs("me/tiny").tags] == ["v1"]
    assert verify("me/tiny", hub, deep=True).files > 5
    again = here.publish(here.run(None), hub, None)
    assert [receipt["pushed"] for receipt in again] == [[], []]
    assert len(api.list_repo_commits("me/tiny")) == 1 + 1  # creation and one commit


def test_transformers_and_peft_load_what_was_published(session, hub, local_hub, tmp_path, monkeypatch, project):
    import huggingface_hub.constants
    import torch
    from huggingface_hub import snapshot_download
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    here = session()
    here.publish(here.run(None), hub, None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folders = {
        name: snapshot_download(f"me/{name}", endpoint=hub.endpoint, token=False) for name in ("tiny", "tiny-adapter")
    }
    merged, report = AutoModelForCausalLM.from_pretrained(folders["tiny"], output_loading_info=True)
    assert not report["missing_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folders["tiny"])
    ids = tokenizer("the fox", return_tensors="pt").input_ids
    assert merged.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    base = AutoModelForCausalLM.from_pretrained(project / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folders["tiny-adapter"])
    with torch.no_grad():
        difference = (adapted(ids).logits - merged.float()(ids).logits).abs().max()
    assert difference < 0.05  # the merged weights are rounded to bf16, the adapted ones are not


def test_one_changed_byte_is_found_and_named(session, hub, local_hub):
    here = session()
    here.publish(here.run(None), hub, None)
    local_hub.api().upload_file(repo_id="me/tiny", path_in_repo="generation_config.json", path_or_fileobj=b"{ }")
    with pytest.raises(VerifyError, match=r"generation_config\.json"):
        verify("me/tiny", hub)
    verify("me/tiny", hub, revision="v1")


def test_the_release_file_is_all_that_is_known(session, hub, local_hub, tmp_path):
    here = session()
    here.publish(here.run(None), hub, None)
    path = local_hub.api().hf_hub_download("me/tiny", FILE_NAME, local_dir=tmp_path)
    release = Release.model_validate(json.loads(Path(path).read_text()))
    assert release.recipe == TEXT
    assert release.target == "weights"
    readme = local_hub.api().hf_hub_download("me/tiny", "README.md", local_dir=tmp_path)
    listed = {file.path: file.sha256 for file in release.targets[0].files}
    assert listed["README.md"] == hashlib.sha256(Path(readme).read_bytes()).hexdigest()
    assert str(tmp_path.parent) not in Path(path).read_text()  # nothing of this machine's folders


def test_anyone_can_make_it_again(session, hub, project, tmp_path):
    from hubforge import reproduce

    here = session()
    here.publish(here.run(None), hub, None)
    release = reproduce.fetch_release("me/tiny", hub, revision=None, folder=None, report=Quiet())
    with pytest.raises(SourceError, match="--source base=PATH"):
        reproduce.write_recipe(release, tmp_path / "again", {})
    sources = {name: str(project / name) for name in ("base", "one", "two")}
    path = reproduce.write_recipe(release, tmp_path / "again", sources)
    other = Session(recipe.load(path), LocalStore(tmp_path / "again-store"), Settings(device="cpu"), Quiet(), hub)
    compared = reproduce.reproduce(other, release, everything=False)
    assert compared and all(one.same for one in compared)
    wrong = reproduce.write_recipe(release, tmp_path / "wrong", sources | {"two": sources["one"]})
    other = Session(recipe.load(wrong), LocalStore(tmp_path / "wrong-store"), Settings(device="cpu"), Quiet(), hub)
    with pytest.raises(SourceError, match="'two' is not the one that was published"):
        reproduce.reproduce(other, release, everything=False)


def test_what_a_push_would_change(session, hub):
    here = session()
    outcome = here.run(None)
    first = here.plan_push(outcome.plan, hub)
    assert [change.exists for change in first] == [False, False]
    here.publish(outcome, hub, None)
    assert [change.changes for change in here.plan_push(outcome.plan, hub)] == [False, False]
    other = session(TEXT.replace("A model for tests.", "Another summary.").replace(", tag: v1", ""))
    changes = other.plan_push(other.plan(None), hub)[0]
    assert {file.path for file in changes.replaced} == {"README.md", "hubforge.release.json", "SHA256SUMS"}
    assert "-A model for tests." in changes.card_diff and "+Another summary." in changes.card_diff


def test_a_plan_before_the_run_says_what_cannot_be_known_and_deletes_nothing(session, hub):
    here = session()
    here.publish(here.run(None), hub, None)
    later = session(TEXT.replace("density: 0.5", "density: 0.4").replace(", tag: v1", ""))
    weights, adapter = later.plan_push(later.plan(None), hub)
    assert weights.unknown == ("stages.blend", "stages.merged") and adapter.unknown == ("stages.blend",)
    assert not weights.changes_files and weights.foreign == () and weights.changes


def test_what_people_wrote_on_a_real_card_stays_and_a_real_conflict_is_settled(session, hub, local_hub):
    """Through the staged publish, on a card as it is really rendered."""
    api = local_hub.api()
    here = session(TEXT.replace(", tag: v1", ""))
    here.publish(here.run(None), hub, None)
    page = Path(api.hf_hub_download("me/tiny", "README.md")).read_text()
    mark = next(line for line in page.splitlines() if line.startswith("<!-- hubforge:results"))
    wrote = page.replace(mark, f"## A word of thanks\n\nTo everybody.\n\n{mark}")
    api.upload_file(path_or_fileobj=wrote.encode(), path_in_repo="README.md", repo_id="me/tiny")
    receipts = here.publish(here.run(None), hub, None)
    assert receipts[0]["pushed"] == []
    verify("me/tiny", hub)
    api.upload_file(
        path_or_fileobj=wrote.replace("word_count", "better_count").encode(),
        path_in_repo="README.md",
        repo_id="me/tiny",
    )
    with pytest.raises(PublishError, match="the section results was edited by hand"):
        here.publish(here.run(None), hub, None)
    with pytest.raises(VerifyError, match="the section results is not as it was published"):
        verify("me/tiny", hub)
    other = session(TEXT.replace("A model for tests.", "Another summary.").replace(", tag: v1", ""))
    other.publish(other.run(None), hub, None, take="ours")
    page = Path(api.hf_hub_download("me/tiny", "README.md", force_download=True)).read_text()
    assert "To everybody." in page and "Another summary." in page and "better_count" not in page


def test_one_flipped_byte_on_the_hubs_disk_is_found_and_named(session, hub, local_hub, tmp_path):
    here = session()
    here.publish(here.run(None), hub, None)
    size = here.store.get(here.plan(None).steps["stages.merged"].key, "merged").path / "model.safetensors"
    (blob,) = [
        path for path in (tmp_path / "hub").rglob("*") if path.is_file() and path.read_bytes() == size.read_bytes()
    ]
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    with pytest.raises(VerifyError, match=r"model\.safetensors"):
        verify("me/tiny", hub, deep=None)
