"""Op, TensorOp, Ref, Artifact, Context: all that a contributor must read to add a step.

An op is a frozen Pydantic model: its fields are its part of a recipe and its identity. A field whose type is a `Ref`
is an edge of the graph. `run(ctx)` reads its inputs through `ctx`, writes its files under `ctx.out`, returns the facts
worth keeping (JSON), and touches nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic import Field as PydanticField
from pydantic_core import core_schema

from hubforge.combination import Combination, Thinned
from hubforge.errors import StepError
from hubforge.events import Event, Note, Progress, Warned

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

Kind = Literal["model", "adapter", "mask", "dataset", "gguf", "metrics", "card", "receipt"]
Metrics = dict[str, Any]  # JSON: what a step found out; kept in the manifest and shown on the card
T = TypeVar("T")
Section = Literal["sources", "masks", "adapters", "stages", "quantize", "evals", "publish"]


class Ref(str):
    """The name of a source or step, as written in a recipe. A field of this type is an edge of the graph."""

    kinds: ClassVar[tuple[Kind, ...]] = ()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls,
            core_schema.str_schema(strict=True, min_length=1),
            serialization=core_schema.plain_serializer_function_ser_schema(str),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, "x-kinds": list(cls.kinds)}


class ModelRef(Ref):
    """The name of a model: a source or a stage."""

    kinds = ("model",)


class AdapterRef(Ref):
    """The name of an adapter: a source, a trained adapter, or a stage that merges adapters."""

    kinds = ("adapter",)


class MaskRef(Ref):
    """The name of a mask: a source or an entry under `masks`."""

    kinds = ("mask",)


class DatasetRef(Ref):
    """The name of a dataset source."""

    kinds = ("dataset",)


class GgufRef(Ref):
    """The name of a GGUF file: a source or an entry under `quantize`, such as `gguf/Q6_K`."""

    kinds = ("gguf",)


class ModelOrGgufRef(Ref):
    """The name of something that generates text: a model or a GGUF file."""

    kinds = ("model", "gguf")


@dataclass(frozen=True)
class FileDigest:
    """One file of an artifact: path relative to its folder with forward slashes, bytes, sha256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """What a step or source left behind: a folder, and the facts of its manifest.

    For a source that is a single file, `path` is that file.
    """

    name: str
    kind: Kind
    key: str
    path: Path
    files: tuple[FileDigest, ...] = ()
    metrics: Metrics = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)  # a source: repo, commit, licence ...; a step: its op

    def read_json(self, name: str) -> Any:
        """The JSON file of that name in the artifact's folder; StepError when it is missing or not JSON."""
        folder = self.path.parent if self.path.is_file() else self.path
        try:
            return json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise StepError(f"{name} of {self.name!r} cannot be read: {error}", where=str(self.path)) from error


@dataclass(frozen=True)
class Settings:
    """What the person at the terminal decides, and no key depends on."""

    device: str = "auto"  # auto | cpu | cuda | cuda:0 | mps
    offline: bool = False
    memory: int = 2 << 30  # bytes a streaming step may hold
    llama_cpp: Path | None = None  # a llama.cpp checkout to convert with
    cache: Path | None = None  # tools fetched once (converter trees); None: the user's cache folder


@dataclass(frozen=True)
class Context:
    """All that a running op may touch."""

    name: str  # of the step, e.g. "stages.healed" or "evals.ifeval/gguf/Q6_K"
    out: Path  # write here and nowhere else; after a kill it still holds what was written before
    inputs: Mapping[str, Artifact]
    settings: Settings = Settings()
    seed: int = 0
    where: str = ""  # `recipes/x.yaml:41`, for errors
    report: Callable[[Event], None] = lambda event: None
    sha256: dict[str, str] = field(default_factory=dict)  # digests a step took while writing, by path under `out`
    fused: Mapping[str, Fused] = field(default_factory=dict)  # refs computed in the same pass; not among `inputs`

    def artifact(self, ref: Ref) -> Artifact:
        """What that ref points to."""
        return self.inputs[str(ref)]

    def path(self, ref: Ref) -> Path:
        """The folder (or, for a single-file source, the file) that ref points to."""
        return self.inputs[str(ref)].path

    def note(self, text: str) -> None:
        self.report(Note(self.name, text))

    def warn(self, text: str) -> None:
        self.report(Warned(self.name, text, self.where))

    def progress(self, done: float, total: float | None, unit: str = "", what: str = "") -> None:
        """Say how far this step is. Cheap: reporters drop what comes too fast to read."""
        self.report(Progress(self.name, what, done, total, unit))

    def track(self, items: Iterable[T], total: int | None = None, unit: str = "", what: str = "") -> Iterator[T]:
        """The items, with progress reported after each."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        for done, item in enumerate(items, 1):
            yield item
            self.progress(done, total, unit, what)

    @cached_property
    def device(self) -> str:
        """The torch device to compute on: the one asked for, else CUDA, else the CPU."""
        if self.settings.device != "auto":
            return self.settings.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Fused:
    """A TensorOp whose output another takes as it computes it: float32, never rounded, never on the disk."""

    op: TensorOp
    ctx: Context  # of the step it would be by itself; nothing is written to its `out`
    metrics: Metrics = field(default_factory=dict)  # filled in by the engine


@dataclass(frozen=True)
class Needs:
    """What a step will take, as far as its fields tell; for launchers and the preflight. Bytes."""

    gpus: int = 0
    memory: int = 0
    disk: int = 0


class Op(BaseModel):
    """One kind of step. A subclass in `hubforge/<section>/<name>.py` *is* `op: <name>` of that section.

    The first line of its docstring is what `hubforge ops` and the cards say it does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, use_attribute_docstrings=True)

    makes: ClassVar[Kind]
    version: ClassVar[int] = 1  # bump when the same fields would give other bytes
    pins: ClassVar[tuple[str, ...]] = ()  # packages whose version is part of the key
    exact: ClassVar[bool] = True  # False: the same key may give other bytes (another machine, a GPU)
    requires: ClassVar[tuple[str, ...]] = ()  # importable modules it needs; `doctor` and the preflight read this
    extra: ClassVar[str] = ""  # the hubforge extra that brings them, e.g. "gguf"
    formula: ClassVar[str] = ""  # one line, Unicode maths, shown on cards: "W + s·Δ"
    source: ClassVar[str] = ""  # paper or code the method comes from
    form: ClassVar[str] = ""  # of a mask: fisher, gate, layers or subspace, which its files are called by
    each: ClassVar[str] = ""  # a list field that becomes one step per entry
    unkeyed: ClassVar[tuple[str, ...]] = ()  # fields that change no byte of the output: not in the key, not inputs
    resumable: ClassVar[bool] = False  # True: run() goes on from what a killed run left in ctx.out

    def expand(self, name: str) -> dict[str, Op]:
        """The steps this recipe entry stands for, by name. One, or one per entry of the field named by `each`."""
        if not self.each:
            return {name: self}
        entries = getattr(self, self.each)
        return {f"{name}/{entry}": self.model_copy(update={self.each: type(entries)([entry])}) for entry in entries}

    def misfit(self, field: str, form: str) -> str:
        """How to mend that a mask of that form is given in that field; "" where it fits. Told before anything runs."""
        return ""

    def needs(self) -> Needs:
        return Needs()

    def preflight(self, ctx: Context) -> None:
        """Raise for whatever can be known before any work starts. `ctx.inputs` may lack what is not made yet."""

    def run(self, ctx: Context) -> Metrics | None:
        raise NotImplementedError(type(self).__name__)


def _template(text: str) -> str:
    """A chat template, or "auto"; ValueError where it cannot be one, with the line of what Jinja does not take."""
    import jinja2

    if text != "auto" and "{" not in text:
        raise ValueError(f"{text[:40]!r} is no template: give `auto`, or the text of one in Jinja")
    # Transformers' own tag, which marks what the assistant says.
    plain = re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{#\1 \2#}", text)
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"is no template that Jinja reads: {error.message} (line {error.lineno} of it)") from error
    return text


ChatTemplate = Annotated[str, AfterValidator(_template)]
CHAT_TEMPLATE = (
    "The chat template of the output: `auto` (the one that most of the models have; of several the first), or the text "
    "of one in Jinja. By default the one beside the tokenizer stays."
)


@dataclass(frozen=True)
class Place:
    """Which rows of which tensor a TensorOp is asked for, and what is known beyond them."""

    name: str  # the tensor, as the model the op starts from calls it
    layer: int | None = None  # the number of its decoder layer; None for embeddings, norms, heads and towers
    shape: tuple[int, ...] = ()  # of the whole tensor
    first: int = 0  # the first row at hand
    known: Any = None  # what `prepare` returned
    totals: Mapping[str, Any] = field(default_factory=dict)  # what `measure` found over the whole tensor
    turn: int = 0  # which of its passes `measure` is asked for, from 0


class TensorOp(Op):
    """A merge method: one pure function of tensors; `hubforge.tensors.engine` streams, lays out, writes and resumes.

    It is called with blocks of rows, so it must work element by element but for what `measure` found; a method that
    cannot overrides `whole`. Inputs come as float32, all of one shape, by ref: a model's weights, an adapter's delta
    (scaling * B @ A), a mask's values. A ref that lacks the tensor is absent. They must not be changed in place.
    """

    makes: ClassVar[Kind] = "model"
    resumable: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("torch", "numpy")
    extra: ClassVar[str] = "merge"
    computes: ClassVar[bool] = True  # False: only names change, so 8-bit floats stay as they are
    hides: ClassVar[bool] = False  # True: NaN in an input may not reach the output, so the inputs are looked at too
    combines: ClassVar[bool] = False  # True: each tensor is a `combination` of the inputs, and that is all of it
    thins: ClassVar[bool] = False  # True: it is a `thinned_sum` of them, which kernels can make as well as `tensor`
    on_gpu: ClassVar[bool] = False  # True: it computes on tensors of a GPU as well, as tests have shown
    unkeyed: ClassVar[tuple[str, ...]] = ("fuse",)  # it changes no byte of this step, only of those that use it

    dtype: Literal["bfloat16", "float16", "float32"] | None = PydanticField(
        None, description="Element type of the output; by default each tensor keeps the one it has in the base model."
    )
    nan: Literal["error", "keep"] = PydanticField(
        "error",
        description="NaN or infinity in what is computed: an error that names the input it comes from, or keep. The "
        "infinities of the base, such as clamp bounds, are always kept.",
    )
    rounding: Literal["nearest", "stochastic"] = PydanticField(
        "nearest",
        description="How float32 becomes `dtype`: to the nearest value, or at random to the one below or above so that "
        "the mean is right and small changes survive on average (bfloat16 and float16).",
    )
    fuse: bool = PydanticField(
        True,
        description="Whether stages that use this one compute it in their own pass over the weights, unrounded; false "
        "stores it first, rounded, and has them read that.",
    )
    drop_towers: bool = PydanticField(
        False,
        description="Leave out the vision and audio towers of a multimodal Gemma 3 or 4: the output is its text "
        "decoder alone, with the same logits for text.",
    )
    chat_template: ChatTemplate | None = PydanticField(None, description=CHAT_TEMPLATE)
    max_shard_size: float = PydanticField(5.0, gt=0, description="Largest size of one output file, in GB (10^9 bytes).")

    @property
    def base_ref(self) -> str:
        """The model whose tensors, config and tokenizer the output has."""
        return str(getattr(self, "model"))  # noqa: B009 - a field of the subclass

    @property
    def mask_stem(self) -> str:
        """Which of a mask's files is an input: `fisher`, or the `gate` that lies beside it in a published folder."""
        return "fisher"

    def whole(self) -> bool:
        """Whether `tensor` needs all rows of a tensor at once (it then takes the memory of the largest)."""
        return False

    def apart(self) -> str:
        """Why this op can neither be computed in another's pass nor compute its models in its own; "" when it can."""
        return "" if self.vocabulary() is None else "its models' tokens are matched by their tokenizers' files"

    def prepare(self, ctx: Context) -> Any:
        """What the method must know of its inputs besides their tensors; found as `at.known`."""
        return None

    def review(self, ctx: Context) -> Metrics:
        """What to say of the finished output, which lies under `ctx.out`; added to the step's metrics."""
        return {}

    def changes(self, name: str, present: frozenset[str]) -> bool:
        """Whether the output differs from the base's tensor, given the refs that have it; if not, its bytes are copied.

        Raise StepError for a tensor that must not be absent.
        """
        return len(present) > 1

    def skips(self, name: str, present: frozenset[str]) -> bool:
        """Whether a tensor of the base is left out, given the refs that have it."""
        return False

    def vocabulary(self) -> Any:
        """How vocabularies that differ become one (`tensors.vocabulary.Wanted`); None: rows are merged as they are."""
        return None

    def measures(self) -> int:
        """How many passes over each tensor that changes `measure` makes before `tensor`, which needs `at.totals`."""
        return 0

    def measure(self, w: Mapping[str, Tensor], at: Place) -> Mapping[str, Any]:
        """What `tensor` needs to know of these rows. Inputs not touched here are not read.

        at.turn: the pass; from the second on, `at.totals` holds what those before found.
        """
        return {}

    def combine(self, found: Sequence[Mapping[str, Any]], at: Place) -> Mapping[str, Any]:
        """What is known of the whole tensor after a pass, from that of its runs of rows in order. By default sums.

        at: the whole tensor; `at.totals` are those of the passes before, and are replaced by what this returns.
        """
        return {name: sum(each[name] for each in found) for name in found[0]}

    def measure_packed(self, w: Mapping[str, ndarray], at: Place) -> Mapping[str, Any]:
        """The same as `measure` from bfloat16 rows, uint16 [elements], for an op that `combines`."""
        raise NotImplementedError(type(self).__name__)

    def combination(self, present: frozenset[str], at: Place) -> Combination:
        """What these rows of the output are, for an op that `combines`, given the refs that have the tensor."""
        raise NotImplementedError(type(self).__name__)

    def thinned_sum(self, present: frozenset[str], at: Place) -> Thinned:
        """The same for an op that `thins`."""
        raise NotImplementedError(type(self).__name__)

    def tensor(self, w: Mapping[str, Tensor], at: Place) -> Tensor:
        """These rows of the output, float32."""
        return self.combination(frozenset(w), at).of(w)

    def rename(self, name: str) -> str | None:
        """The name of a tensor of the base in the output; None leaves it out."""
        return name

    def keeps(self, file: str) -> bool:
        """Whether a config, tokenizer or processor file of the base belongs to the output."""
        return True

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The output's config.json, from the base's; keys keep their order and what is unknown is kept."""
        return config
