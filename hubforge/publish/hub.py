"""`op: hub`: publish to a model repository on a Hub, in one commit that is staged, verified and promoted, and a tag."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from hubforge.events import Event
from hubforge.op import AdapterRef, GgufRef, MaskRef, Metrics, ModelRef
from hubforge.publish._access import Access, check_access, may_publish, sends_token_in_clear
from hubforge.publish._links import is_slug
from hubforge.publish._paths import path_fault, repo_fault, tag_fault
from hubforge.publish._plan import PushPlan, plan_push
from hubforge.publish._push import push
from hubforge.publish._sums import read_sums, sums_text
from hubforge.publisher import Hub, Publisher, Upload

__all__ = [
    "Access",
    "HubPublisher",
    "PushPlan",
    "check_access",
    "may_publish",
    "plan_push",
    "push",
    "read_sums",
    "sends_token_in_clear",
    "sums_text",
]

_CONTENTS = ("model", "adapter", "gguf", "masks")


class HubPublisher(Publisher):
    """A model repository on the Hub: files, card, release file and checksums in one commit, read back, then tagged."""

    version: ClassVar[int] = 1
    staged: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("huggingface_hub",)
    source: ClassVar[str] = "huggingface_hub: preupload_lfs_files, create_commit(parent_commit=...)"

    repo: str = Field(
        description="Repository, as namespace/name: letters, digits, '-', '_' and '.', no '--' or '..'; at most 96"
        " characters each. It is made when it does not exist."
    )
    model: ModelRef | None = Field(None, description="The stage (or source) whose model is published.")
    adapter: AdapterRef | None = Field(None, description="The adapter that is published.")
    gguf: GgufRef | None = Field(
        None, description="The entry under `quantize` whose GGUF files are published; `gguf` means all its types."
    )
    masks: list[MaskRef] | None = Field(None, description="The masks that are published together, one or more.")
    folder: str | None = Field(
        None,
        description="Folder of the repository that this release owns, for `gguf` and `masks`: other folders are left"
        " alone, so that a repository can hold one per model. The card at the root is shared.",
    )
    tag: str | None = Field(
        None, description="Tag for the commit, such as v1.0. A tag that marks another release is an error, never moved."
    )
    private: bool = Field(
        False,
        description="Make a new repository private. Pushing to a public one is then an error; a repository that is"
        " private already stays so.",
    )
    collection: str | None = Field(
        None,
        description="Collection that the repository joins once it is public: its slug (me/name-24 digits), or the title"
        " (at most 60 characters) of one in the repository's namespace, which is made when it is missing.",
    )
    supersedes: list[str] | None = Field(
        None,
        description="Repositories (namespace/name) that this one replaces: `new_version` is set on their cards, so that"
        " the Hub points readers here.",
    )
    message: str | None = Field(None, description="First line of the commit message; the release's name by default.")

    @field_validator("repo")
    @classmethod
    def _check_repo(cls, repo: str) -> str:
        if fault := repo_fault(repo):
            raise ValueError(f"{repo!r} {fault}")
        return repo

    @field_validator("folder")
    @classmethod
    def _check_folder(cls, folder: str | None) -> str | None:
        if folder is not None and (fault := path_fault(folder)):
            raise ValueError(f"{folder!r} {fault}")
        return folder

    @field_validator("tag")
    @classmethod
    def _check_tag(cls, tag: str | None) -> str | None:
        if tag is not None and (fault := tag_fault(tag)):
            raise ValueError(f"{tag!r} {fault}")
        return tag

    @field_validator("collection")
    @classmethod
    def _check_collection(cls, collection: str | None) -> str | None:
        if collection is not None and not collection.strip():
            raise ValueError("is empty; leave it out to join none")
        if collection is not None and not is_slug(collection) and len(collection) > 60:
            raise ValueError(f"has {len(collection)} characters, but a collection's title has at most 60")
        return collection

    @field_validator("supersedes")
    @classmethod
    def _check_supersedes(cls, supersedes: list[str] | None) -> list[str] | None:
        for repo in supersedes or ():
            if fault := repo_fault(repo):
                raise ValueError(f"{repo!r} {fault}")
        return supersedes

    @field_validator("message")
    @classmethod
    def _check_message(cls, message: str | None) -> str | None:
        if message is not None and not message.strip():
            raise ValueError("is empty; leave it out to have the release's name")
        return message

    @field_validator("masks")
    @classmethod
    def _check_masks(cls, masks: list[MaskRef] | None) -> list[MaskRef] | None:
        if masks is not None and not masks:
            raise ValueError("is empty, but names one mask or more")
        for mask in masks or ():
            if (masks or []).count(mask) > 1:
                raise ValueError(f"names {str(mask)!r} twice")
        return masks

    @model_validator(mode="after")
    def _check_contents(self) -> HubPublisher:
        if self.repo in (self.supersedes or ()):
            raise ValueError(f"supersedes itself ({self.repo}), but must name other repositories")
        given = [name for name in _CONTENTS if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"has {' and '.join(given)}" if given else "has none of them"
            raise ValueError(f"must name exactly one of model, adapter, gguf and masks, but {found}")
        if self.folder is not None and given[0] not in ("gguf", "masks"):
            raise ValueError(
                f"has `folder`, which only goes with gguf and masks: a {given[0]} loads from the root of a repository"
            )
        return self

    @property
    def contents(self) -> Mapping[str, tuple[str, ...]]:
        """The refs that are published, by the one field that names them: {"masks": ("importance", "core")}."""
        name = next(name for name in _CONTENTS if getattr(self, name) is not None)
        value = getattr(self, name)
        return {name: tuple(value) if isinstance(value, list) else (value,)}

    def push(self, upload: Upload, hub: Hub, report: Callable[[Event], None]) -> Metrics:
        return push(upload, hub, report)
