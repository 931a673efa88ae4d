"""Masks as others load them: a folder with a Fisher, a subspace, a gate, or all; one tensor read at a time."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from hubforge.errors import SourceError
from hubforge.lock import hub_errors
from hubforge.tensors.names import Aliases
from hubforge.tensors.reader import Checkpoint, open_checkpoint, read_header, read_index, read_json

if TYPE_CHECKING:
    from torch import Tensor, nn


KINDS = ("fisher", "subspace", "gate")  # what the files are called


class Directions(NamedTuple):
    """The leading directions of W_instruct − W_pretrained, float32: U (out, k), S (k,), V (in, k)."""

    U: Tensor
    S: Tensor
    V: Tensor


class Mask(Mapping[str, "Tensor"]):
    """The masks of one model. As a mapping: the Fisher of each weight, by its name, in the file's dtype.

    A name may be spelled with any of the prefixes that the same decoder has in other checkpoints
    (`model.layers.…`, `model.language_model.layers.…`). Close it, or use it as a context manager.
    """

    def __init__(self, folder: Path, fetch: Callable[[str], None] | None = None) -> None:
        """fetch: brings the files of a kind into the folder when they are first asked for; None: what is, is there."""
        self.folder, self._fetch = folder, fetch
        self._stack = ExitStack()
        self._opened: dict[str, Checkpoint | None] = {}
        for stem in KINDS if fetch is None else ():
            self._open(stem)  # What is damaged is told at once.

    def _open(self, stem: str) -> Checkpoint | None:
        if stem not in self._opened:
            if self._fetch is not None:
                self._fetch(stem)
            self._opened[stem] = self._found(stem)
        return self._opened[stem]

    @property
    def _fisher(self) -> Checkpoint | None:
        return self._open("fisher")

    @property
    def _subspace(self) -> Checkpoint | None:
        return self._open("subspace")

    @property
    def _gate(self) -> Checkpoint | None:
        return self._open("gate")

    @cached_property
    def _weights(self) -> Aliases:
        return Aliases(self._fisher or (), str(self.folder))

    @cached_property
    def _gated(self) -> Aliases:
        return Aliases(self._gate or (), str(self.folder))

    @cached_property
    def _matrices(self) -> dict[str, None]:
        return dict.fromkeys(name.removesuffix(".S") for name in self._subspace or () if name.endswith(".S"))

    @cached_property
    def _spanned(self) -> Aliases:
        return Aliases(self._matrices, str(self.folder))

    def _found(self, stem: str) -> Checkpoint | None:
        single, index = self.folder / f"{stem}.safetensors", self.folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            return self._stack.enter_context(open_checkpoint(single))
        if not index.is_file():
            pickled = self.folder / f"{stem}.pt"
            return self._stack.enter_context(open_checkpoint(pickled)) if pickled.is_file() else None
        shards = sorted(set(read_index(index).values()))
        tensors = {name: info for shard in shards for name, info in read_header(self.folder / shard).items()}
        return self._stack.enter_context(Checkpoint(self.folder, tensors))

    def __enter__(self) -> Mask:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._fisher or ())

    def __len__(self) -> int:
        return len(self._fisher.tensors) if self._fisher else 0

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._weights.find(name) is not None

    def __getitem__(self, name: str) -> Tensor:
        found = self._weights.find(name)
        if found is None or self._fisher is None:
            raise KeyError(name)
        return self._fisher.read(found)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices that have a subspace."""
        return tuple(self._matrices)

    def directions(self, name: str, rank: int | None = None) -> Directions:
        """U, S and V of a matrix, the first `rank` of them; KeyError when it has no subspace."""
        found = self._spanned.find(name)
        if found is None or self._subspace is None:
            raise KeyError(name)
        U, S, V = (self._subspace.read(f"{found}.{part}")[..., :rank] for part in "USV")
        return Directions(U, S, V)

    def gate(self, name: str) -> Tensor:
        """Importance in [0, 1] of each weight, as `op: combine` made it; KeyError when there is none for the tensor."""
        found = self._gated.find(name)
        if found is None or self._gate is None:
            raise KeyError(name)
        return self._gate.read(found)

    @property
    def layers(self) -> dict[int, dict[str, float]]:
        """Sum, mean and count of the Fisher in each layer; empty without layer_importance.json."""
        path = self.folder / "layer_importance.json"
        if not path.is_file():
            return {}
        return {int(layer): facts for layer, facts in read_json(path)["layers"].items()}

    def check(self, model: nn.Module | Path) -> None:
        """SourceError, naming the tensor, unless the model (or its folder) has all the mask covers, shaped alike."""
        shapes = _shapes(model)
        theirs = Aliases(shapes, "the model")
        weighed = [checkpoint for checkpoint in (self._fisher, self._gate) if checkpoint]
        mine = [(name, info.shape) for checkpoint in weighed for name, info in checkpoint.tensors.items()]
        if self._subspace:
            infos = self._subspace.tensors
            mine += [(name, tuple(infos[f"{name}.{part}"].shape[0] for part in "UV")) for name in self.matrices]
        for name, shape in mine:
            found = theirs.find(name)
            if found is None:
                raise SourceError(f"the model has no {name}: the mask is another model's", where=str(self.folder))
            if tuple(shapes[found]) != tuple(shape):
                what = f"{name} is {list(shapes[found])} in the model and {list(shape)} in the mask"
                raise SourceError(what, where=str(self.folder), mend="The mask is another model's.")


def open_mask(repo_or_folder: str | Path, name: str | None, revision: str | None, endpoint: str | None) -> Mask:
    if name is not None and (PurePosixPath(name).is_absolute() or {"..", "*", "?", "["} & {*name.split("/"), *name}):
        raise SourceError(f"{name!r} is not the name of a folder inside", where=str(repo_or_folder))
    folder, fetch = Path(repo_or_folder), None
    if folder.is_dir():
        files = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*"))]
        if name is not None and (folder / name).is_dir():
            files += [f"{name}/{path.name}" for path in (folder / name).iterdir()]
    else:
        folder, files, fetch = _on_hub(str(repo_or_folder), name, revision, endpoint)
    level = [path.rpartition("/")[2] for path in files if path.rpartition("/")[0] == (name or "")]
    if name is not None and not level and not (folder / name).is_dir():
        raise SourceError(f"there is no mask {name!r}", where=str(repo_or_folder), mend=_others(files, name))
    inside = folder / name if name is not None else folder
    if not any(is_mask(file) for file in level):
        what = "neither fisher.safetensors, subspace.safetensors nor gate.safetensors is here"
        raise SourceError(what, where=str(inside), mend=_others(files, name))
    return Mask(inside, fetch)


def is_mask(file: str) -> bool:
    stem, _, rest = file.partition(".")
    return stem in KINDS and rest in ("safetensors", "safetensors.index.json", "pt")


def _others(files: Iterable[str], name: str | None) -> str:
    """Which folders have a mask, as the help of an error."""
    there = sorted({path.rpartition("/")[0] for path in files if "/" in path and is_mask(path.rpartition("/")[2])})
    if not there:
        return "No folder in it has one either."
    close = difflib.get_close_matches(name or "", there, 1)
    return f"Folders with one: {', '.join(there)}." + (f" Did you mean {close[0]!r}?" if close else "")


def _on_hub(
    repo: str, name: str | None, revision: str | None, endpoint: str | None
) -> tuple[Path, list[str], Callable[[str], None]]:
    """Where a repository's copy is, in the Hub's cache; the files it has there; and what fetches those of a kind."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(endpoint=endpoint)
    try:
        with hub_errors("mask", repo, ""):
            info = api.model_info(repo, revision=revision)
            commit, files = str(info.sha), [entry.rfilename for entry in info.siblings or ()]
            level = {path: path.rpartition("/")[2] for path in files if path.rpartition("/")[0] == (name or "")}
    except HFValidationError as error:
        raise SourceError(f"{repo!r} is neither a folder nor a repository", where=repo) from error

    def fetch(wanted: list[str]) -> Path:
        with hub_errors("mask", repo, ""):
            # Of one commit throughout. An empty list of patterns would mean everything.
            return Path(api.snapshot_download(repo, revision=commit, allow_patterns=wanted or ["none"]))

    def fetch_kind(stem: str) -> None:
        own = [path for path, file in level.items() if file.startswith((f"{stem}.", f"{stem}-"))]
        tensors = [path for path in own if path.endswith((".safetensors", ".safetensors.index.json"))]
        if wanted := tensors or [path for path in own if path.endswith(".pt")]:
            fetch(wanted)

    described = [path for path, file in level.items() if file.endswith(".json") and not is_mask(file)]
    return fetch(described), files, fetch_kind


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(model, Path):
        with open_checkpoint(model) as checkpoint:
            return {name: info.shape for name, info in checkpoint.tensors.items()}
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}
