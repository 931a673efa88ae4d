"""A release file against itself: whatever is changed in it afterwards is named."""

import json
import re
import shutil
from pathlib import Path

import pytest

from hubforge import __version__, recipe
from hubforge.assemble import assemble
from hubforge.keys import artifact_faults, key_faults
from hubforge.lock import resolve_locked
from hubforge.op import Settings
from hubforge.publish._vouched import table_faults, vouched_faults
from hubforge.publisher import Hub
from hubforge.publishing import render
from hubforge.release import Release
from hubforge.reporters import Quiet
from hubforge.session import Session
from hubforge.store import LocalStore


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny_loras):
    """The release file and card of a small recipe with local sources, as they are pushed."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("one", "two"):
        shutil.copytree(tiny_loras[name], folder / name)
    (folder / "r.yaml").write_text(TEXT)
    here = Session(
        recipe.load(folder / "r.yaml"), LocalStore(folder / "store"), Settings(device="cpu"), Quiet(), Hub("http://x")
    )
    outcome = here.run(None)
    pages = render(assemble(here.runner(outcome.plan)), "adapter")
    return json.loads(pages.files["hubforge.release.json"]), pages.files["README.md"].decode()


TEXT = """\
name: tiny
license: mit
sources: {one: {adapter: ./one}, two: {adapter: ./two}}
stages:
  blend: {op: ties, adapters: [one, two], density: 0.5}
publish: {adapter: {op: hub, repo: me/tiny, adapter: blend}}
"""


def release_of(record):
    return Release.model_validate(record)


def test_what_was_published_is_at_one_with_itself(published):
    record, card = published
    release = release_of(record)
    (target,) = release.targets
    assert key_faults(release) == ([], [])
    assert list(artifact_faults(release, target)) == []
    assert list(vouched_faults(card, target.card)) == [] and list(table_faults(card, target)) == []


def changed(record, *path, to):
    made = json.loads(json.dumps(record))
    place = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to(place[path[-1]]) if callable(to) else to
    return made


TAMPERED = {
    "recipe": (("recipe",), lambda text: text.replace("0.5", "0.9"), "stages.blend: density in the recipe is not what"),
    "recipe with another step": (
        ("recipe",),
        lambda text: text.replace("blend", "mixed"),
        "stages.mixed is in the recipe",
    ),
    "recipe that is none": (("recipe",), "name: [", "the recipe in it cannot be read"),
    "fields": (("steps", 0, "fields", "density"), 0.9, "stages.blend: its fields are not those of the recipe"),
    "key of a step": (("steps", 0, "key"), "0" * 64, "stages.blend: recipe, lock and versions do not give its key"),
    "key of a source": (("sources", 0, "key"), "0" * 64, "the source one: its files do not give its key"),
    "bytes of a source": (("sources", 1, "files", 0, "sha256"), "0" * 64, "the source two: its files do not give its"),
    "name of a source": (("sources", 0, "name"), "three", "the source three: its recipe does not have it"),
}


@pytest.mark.parametrize(("path", "to", "fault"), TAMPERED.values(), ids=TAMPERED)
def test_what_was_changed_is_named(published, path, to, fault):
    faults, notes = key_faults(release_of(changed(published[0], *path, to=to)))
    assert notes == [] and any(fault in one for one in faults), faults


def test_what_another_version_made_is_noted_only(published):
    record = changed(
        changed(published[0], "recipe", to=lambda text: text.replace("0.5", "0.9")), "hubforge", to="0.0.9"
    )
    faults, (note,) = key_faults(release_of(record))
    assert faults == [] and "made by hubforge 0.0.9" in note


def test_a_file_that_no_step_made_so_is_named(published):
    release = release_of(changed(published[0], "steps", 0, "files", 0, "sha256", to="0" * 64))
    (fault,) = artifact_faults(release, release.targets[0])
    assert "listed with another sha256 than stages.blend made" in fault


LOCKED = {"one": {"asked": {"adapter": "me/one"}, "commit": "a" * 40, "files": [
    {"path": "adapter_model.safetensors", "size": 1, "oid": "b" * 64, "is_lfs": True}]}}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "to", "fault"),
    [
        ((), None, None),
        (("lock", "sources", "one", "commit"), "c" * 40, "the source one: commit aaaa"),
        (
            ("lock", "sources", "one", "asked", "adapter"),
            "me/x",
            "the source one and the lock: source 'one' was changed",
        ),
        (("lock", "sources", "one", "files", 0, "path"), "x.safetensors", "recipe and lock do not give its key"),
        (("lock",), None, "the source one and the lock: there is no lock yet"),
        (("sources", 0, "repo"), "me/x", "the source one: from me/x, but the recipe has me/one"),
    ],
)
def test_a_lock_that_was_changed_is_named(path, to, fault):
    text = "name: x\nsources: {one: {adapter: me/one}}\n"
    lock = {"version": 1, "sources": LOCKED}
    key = resolve_locked("one", recipe.loads(text, "x").sources["one"], lock, Path("x")).key
    source = {"name": "one", "kind": "adapter", "repo": "me/one", "commit": "a" * 40, "key": key}
    record = {"hubforge": __version__, "name": "x", "recipe_file": "x", "recipe": text}
    record |= {"sources": [source], "lock": lock}
    faults, _ = key_faults(release_of(changed(record, *path, to=to) if path else record))
    assert (faults == []) if fault is None else any(fault in one for one in faults), faults


LAST_DIGEST = r"`[0-9a-f]{64}` \|\n\n<!-- /hubforge:files"
OTHER_DIGEST = f"`{'0' * 64}` |\n\n<!-- /hubforge:files"
CONFIG_ROW = r"\| `adapter_config.json`[^\n]*\n"
CARD = {
    "a number": ("mit", "gpl", "the section licence is not as it was published"),
    "a digest in the table of files": (LAST_DIGEST, OTHER_DIGEST, "its table of files says"),
    "a row of the table of files": (CONFIG_ROW, "", "its table of files lacks adapter_config.json"),
    "a section": (r"<!-- hubforge:made.*?/hubforge:made -->\n", "", "the section made is missing"),
    "an end mark": (r"<!-- /hubforge:made -->\n", "", "the section made is not as it was published"),
    "license": ("license: mit", "license: gpl-3.0", "says license 'gpl-3.0', but the release has 'mit'"),
    "a tag": (r"- ties\n", "", "tags in the front matter lacks 'ties'"),
    "library_name": (r"library_name: peft\n", "", "library_name is missing from the front matter"),
}


@pytest.mark.parametrize(("old", "new", "fault"), CARD.values(), ids=CARD)
def test_what_was_changed_on_a_card_is_named(published, old, new, fault):
    record, card = published
    where = card.index("<!-- hubforge:licence") if old == "mit" else 0
    other, count = re.subn(old, new, card[where:], count=1, flags=re.DOTALL)
    assert count == 1, card
    (target,) = release_of(record).targets
    found = [*vouched_faults(card[:where] + other, target.card), *table_faults(card[:where] + other, target)]
    assert any(fault in one for one in found), found
