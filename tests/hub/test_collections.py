"""Collections, by the real client: made, filled, ordered, shown to those who may see them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

from hubforge.hub import HubSettings, LocalHub, Scope, Token

TOKENS = {
    "hf_ann": "ann",
    "hf_bob": Token("bob", orgs=("team",)),
    "hf_see": Token("ann", role="read"),
    "hf_one": Token("ann", repos=("ann/a",)),
    "hf_list": Token("ann", role="fineGrained", scopes=(Scope("user", "ann", ("collection.write",)),)),
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub", settings=HubSettings(tokens=TOKENS)) as hub:
        yield hub


@pytest.fixture
def ann(hub: LocalHub) -> HfApi:
    api = hub.api("hf_ann")
    for name in ("ann/a", "ann/b"):
        api.create_repo(name)
    api.create_repo("ann/data", repo_type="dataset")
    api.create_repo("ann/hidden", private=True)
    return api


def items(api: HfApi, slug: str) -> list[tuple[str, str, str | None, int]]:
    return [(item.item_type, item.item_id, item.note, item.position) for item in api.get_collection(slug).items]


def test_a_collection_is_made_once(ann: HfApi):
    made = ann.create_collection("Poets of 2026!", description="Models that rhyme.", exists_ok=True)
    assert made.slug.startswith("ann/poets-of-2026-") and len(made.slug.rpartition("-")[2]) == 24
    assert (made.title, made.description, made.owner, made.private, made.items) == (
        "Poets of 2026!", "Models that rhyme.", "ann", False, [],
    )  # fmt: skip
    assert ann.create_collection("Poets of 2026!", exists_ok=True).slug == made.slug
    with pytest.raises(HfHubHTTPError) as caught:
        ann.create_collection("Poets of 2026!")
    assert (caught.value.response.status_code, caught.value.response.json()["slug"]) == (409, made.slug)


def test_items_are_added_once_with_notes_and_in_order(ann: HfApi):
    slug = ann.create_collection("Poets").slug
    other = ann.create_collection("Other").slug
    ann.add_collection_item(slug, "ann/a", "model", note="the first")
    ann.add_collection_item(slug, "ann/data", "dataset")
    ann.add_collection_item(slug, "2310.06825", "paper")
    whole = ann.add_collection_item(slug, other, "collection")
    assert items(ann, slug) == [
        ("model", "ann/a", "the first", 0),
        ("dataset", "ann/data", None, 1),
        ("paper", "2310.06825", None, 2),
        ("collection", other, None, 3),
    ]
    with pytest.raises(HfHubHTTPError, match="409"):
        ann.add_collection_item(slug, "ann/a", "model")
    assert len(ann.add_collection_item(slug, "ann/a", "model", exists_ok=True).items) == 4
    ann.update_collection_item(slug, whole.items[1].item_object_id, position=0, note="now first")
    ann.delete_collection_item(slug, whole.items[2].item_object_id)
    assert [item[:3] for item in items(ann, slug)] == [
        ("dataset", "ann/data", "now first"),
        ("model", "ann/a", "the first"),
        ("collection", other, None),
    ]
    with pytest.raises(HfHubHTTPError, match="404"):
        ann.delete_collection_item(slug, "0" * 24)


@pytest.mark.parametrize(
    ("id", "kind", "code"),
    [
        ("ann/none", "model", 404),
        ("x", "paper", 400),
        ("ann/a", "thing", 400),
        ("ann/x-" + "0" * 24, "collection", 404),
    ],
)
def test_what_is_not_there_is_not_added(ann: HfApi, id: str, kind: str, code: int):
    slug = ann.create_collection("Poets").slug
    with pytest.raises(HfHubHTTPError) as caught:
        ann.add_collection_item(slug, id, kind)  # type: ignore[arg-type]
    assert caught.value.response.status_code == code
    assert items(ann, slug) == []


def test_a_new_title_breaks_no_link(ann: HfApi):
    slug = ann.create_collection("Poets").slug
    changed = ann.update_collection_metadata(
        slug, title="Bards", description="d", theme="pink", private=True, position=3
    )
    assert (changed.slug, changed.title, changed.theme, changed.private) == (slug, "Bards", "pink", True)
    assert ann.get_collection("ann/anything-" + slug.rpartition("-")[2]).title == "Bards"
    with pytest.raises(HfHubHTTPError, match="404"):
        ann.get_collection("bob/poets-" + slug.rpartition("-")[2])
    ann.delete_collection(slug)
    ann.delete_collection(slug, missing_ok=True)
    with pytest.raises(HfHubHTTPError, match="404"):
        ann.get_collection(slug)


def test_collections_are_listed_by_owner_and_item(hub: LocalHub, ann: HfApi):
    first, second = ann.create_collection("One").slug, ann.create_collection("Two").slug
    hub.api("hf_bob").create_collection("Three", namespace="team")
    ann.add_collection_item(second, "ann/a", "model")
    assert {each.slug for each in ann.list_collections(owner="ann")} == {first, second}
    assert [each.slug for each in ann.list_collections(item="models/ann/a")] == [second]
    assert len(list(ann.list_collections(limit=2))) == 2
    assert {each.title for each in ann.list_collections()} == {"One", "Two", "Three"}


def test_who_sees_and_who_changes(hub: LocalHub, ann: HfApi):
    private = ann.create_collection("Private", private=True).slug
    public = ann.create_collection("Public").slug
    ann.add_collection_item(public, "ann/hidden", "model")
    ann.add_collection_item(public, "ann/a", "model")
    ann.add_collection_item(public, private, "collection")
    assert [item[1] for item in items(hub.api("hf_bob"), public)] == ["ann/a"]  # What he may not see is not there.
    assert [item[1] for item in items(ann, public)] == ["ann/hidden", "ann/a", private]
    for token, sees, changes in (
        ("hf_see", True, False), ("hf_bob", False, False), ("hf_one", False, False), ("hf_list", True, True),
    ):  # fmt: skip
        api = hub.api(token)
        assert (private in {each.slug for each in api.list_collections()}) is sees, token
        if changes:
            api.update_collection_metadata(public, description=token)
            continue
        with pytest.raises(HfHubHTTPError, match="403"):
            api.update_collection_metadata(public, description=token)
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_collection("Mine", namespace="ann")


def test_deleted_repositories_leave_collections_alone(ann: HfApi):
    slug = ann.create_collection("Poets").slug
    ann.add_collection_item(slug, "ann/a", "model")
    ann.add_collection_item(slug, "ann/b", "model")
    ann.delete_repo("ann/a")
    assert [item[1] for item in items(ann, slug)] == ["ann/b"]


@pytest.mark.parametrize(
    ("title", "more"),
    [("", {}), (" ", {}), ("x" * 61, {}), ("x", {"description": "x" * 151}), ("x", {"namespace": "a/.."})],
)
def test_titles_and_texts_have_limits(ann: HfApi, title: str, more: dict[str, str]):
    with pytest.raises(HfHubHTTPError, match="Bad request"):
        ann.create_collection(title, **more)


def test_the_pages_show_collections_without_trusting_them(hub: LocalHub, ann: HfApi):
    slug = ann.create_collection("<b>Poets</b>", description="<script>alert(1)</script>").slug
    ann.add_collection_item(slug, "ann/a", "model", note="<img src=x onerror=alert(1)>")
    ann.add_collection_item(slug, "ann/hidden", "model")
    page = get_session().get(f"{hub.endpoint}/collections/{slug}")
    assert page.status_code == 200 and 'href="/ann/a"' in page.text and "ann/hidden" not in page.text
    assert "<script>" not in page.text and "<img" not in page.text and "&lt;b&gt;Poets" in page.text
    for path in ("/", "/ann", "/ann/a"):
        assert f'href="/collections/{slug}"' in get_session().get(hub.endpoint + path).text, path
    ann.update_collection_metadata(slug, private=True)
    assert get_session().get(f"{hub.endpoint}/collections/{slug}").status_code == 404
    assert slug not in get_session().get(hub.endpoint).text


def test_collections_outlive_the_server(tmp_path: Path):
    with LocalHub(tmp_path) as hub:
        slug = hub.api().create_collection("Poets", namespace="me").slug
    with LocalHub(tmp_path) as hub:
        assert hub.api().get_collection(slug).title == "Poets"
