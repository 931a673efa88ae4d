"""GGUF files: converted once, quantized per type, each checked against the model it stands for."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hubforge.errors import StepError
from hubforge.op import Artifact, Context, GgufRef, Kind, Metrics, ModelRef, Op

Unquantized = Literal["BF16", "F16", "F32"]
Type = Literal[
    "BF16", "F16", "F32", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_M",
]  # fmt: skip
UNQUANTIZED = ("BF16", "F32", "F16")  # the order of preference for quantizing from: F16 has no room for large weights
CARD_KEYS = ("license", "license_name", "license_link", "base_model", "datasets", "language", "tags")
GENERAL_KEYS = (
    "author", "basename", "description", "doi", "finetune", "organization", "quantized_by", "repo_url", "size_label",
    "source_url", "url", "uuid", "version",
)  # fmt: skip
# Mean KL in nats by bits of the type. Not what a quant should cost (Q4_K_M of a 1B model: .026), but what only a wrong
# conversion exceeds, tiny models included.
_LIMITS = {"BF16": 0.01, "F16": 0.01, "F32": 0.01, "Q8": 0.02, "Q6": 0.05, "Q5": 0.1, "Q4": 0.3, "IQ4": 0.3}
_LIMIT_BELOW = 1.0


class Check(BaseModel):
    """What a GGUF must hold against the model it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kl: float | None = Field(default=None, gt=0)
    """Largest mean KL divergence of its logits from the model's, in nats; default by type, .01 (BF16) to 1 (Q2_K)."""
    strings: tuple[str, ...] = ()
    """Texts whose token ids must be the model's, besides the built-in ones."""
    passages: tuple[str, ...] = ()
    """Texts to compare logits on, 256 tokens of each; default four built-in ones."""


class Gguf(Op):
    """A GGUF of a model for llama.cpp, checked: the same tokens, and logits as near as its type allows.

    One conversion by llama.cpp's converter; every quantized type is made from its result.
    """

    makes: ClassVar[Kind] = "gguf"
    pins: ClassVar[tuple[str, ...]] = ("cyllama",)
    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers", "cyllama")
    extra: ClassVar[str] = "gguf"
    source: ClassVar[str] = "llama.cpp: convert_hf_to_gguf.py, llama_model_quantize"
    each: ClassVar[str] = "types"
    resumable: ClassVar[bool] = True

    model: ModelRef = Field(description="The model to convert.")
    types: tuple[Type, ...] = Field(
        ("BF16", "Q8_0", "Q6_K", "Q4_K_M"),
        min_length=1,
        description="GGUF types, one file each. Where none is unquantized (BF16, F16, F32), BF16 is made besides.",
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description='Start of the file names, as in NAME-Q6_K.gguf, and general.name; default "model".',
    )
    metadata: dict[str, Any] = Field(
        default_factory=dict,
        description=f"What the files say of themselves: {', '.join(CARD_KEYS + GENERAL_KEYS)}. What the model's own "
        "card says of these is taken over.",
    )
    check: Check = Field(Check(), description="Limits of the checks after each file is made.")
    unquantized: GgufRef | None = Field(
        None, description="The unquantized GGUF to quantize from; set by itself to the one among `types`."
    )

    @field_validator("types")
    @classmethod
    def _once_each(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(types)) < len(types):
            raise ValueError("each type may be named once")
        return types

    @field_validator("metadata")
    @classmethod
    def _known_keys(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        known = CARD_KEYS + GENERAL_KEYS
        for key in metadata:
            if key not in known:
                close = get_close_matches(key, known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise ValueError(f"there is no key {key!r}; {hint}")
        return metadata

    def expand(self, name: str) -> dict[str, Op]:
        """One step per type. The quantized ones take the unquantized one; it is there even when nobody asked for it."""
        source = next((type_ for type_ in UNQUANTIZED if type_ in self.types), "BF16")
        types = (source, *(type_ for type_ in self.types if type_ != source))
        ref = self.unquantized or GgufRef(f"{name}/{source}")
        return {
            f"{name}/{type_}": self.model_copy(
                update={"types": (type_,), "unquantized": None if type_ in UNQUANTIZED else ref}
            )
            for type_ in types
        }

    def preflight(self, ctx: Context) -> None:
        """That the converter is there, or may be fetched."""
        from hubforge.llama_cpp.tree import find_tree, get_tree

        if not self._converts:
            return
        tree = find_tree(ctx.settings.llama_cpp, ctx.settings.cache)
        if tree is None and ctx.settings.offline:
            get_tree(None, ctx.settings.cache, offline=True)  # Raises, and says what to do.

    def run(self, ctx: Context) -> Metrics:
        """Make the file of the one type this step is for, unless a killed run left it whole; then check it."""
        from hubforge.llama_cpp.header import read_header
        from hubforge.llama_cpp.process import UNFINISHED
        from hubforge.models import read_config

        read_config(ctx.path(self.model))
        for leftover in ctx.out.glob(f"{UNFINISHED}*"):
            leftover.unlink()
        target = ctx.out / f"{self.name or 'model'}-{self.types[0]}.gguf"
        notes = ctx.out / ".made.json"  # beside a file made by a killed run: what is in the metrics and not in it
        if not (target.is_file() and notes.is_file()):
            target.unlink(missing_ok=True)
            made = self._convert(ctx, target) if self._converts else self._quantize(ctx, target)
            notes.write_text(json.dumps(made), encoding="utf-8")
        made = json.loads(notes.read_text(encoding="utf-8"))
        header = read_header(target)
        checked = self._check(ctx, target)
        notes.unlink()
        return {
            "type": self.types[0],
            "file": target.name,
            "bytes": header.size,
            "bits_per_weight": round(header.bits_per_weight, 4),
            "parameters": header.parameters,
            "tensors": len(header.tensors),
            "tensor_types": header.count_types(),
            **checked,
            **made,
        }

    @property
    def _converts(self) -> bool:
        return self.types[0] in UNQUANTIZED

    def _convert(self, ctx: Context, target: Path) -> Metrics:
        from hubforge.llama_cpp.converter import convert
        from hubforge.llama_cpp.tree import get_tree

        tree = get_tree(
            ctx.settings.llama_cpp,
            ctx.settings.cache,
            offline=ctx.settings.offline,
            report=lambda done, total: ctx.progress(done, total, "B", "fetching llama.cpp's converter, once"),
        )
        named = convert(
            ctx.path(self.model),
            target,
            tree=tree,
            name=self.name or "model",
            type_=self.types[0],
            card={key: self.metadata[key] for key in CARD_KEYS if key in self.metadata},
            general={key: self.metadata[key] for key in GENERAL_KEYS if key in self.metadata},
            progress=lambda share: ctx.progress(share, 1.0, "", f"converting to {self.types[0]}"),
        )
        if named is not None:
            ctx.note(f"llama.cpp does not list this tokenizer; its Split regex is that of {named}")
        return {"converter": tree.build, "converter_sha256": tree.sha256, "pre_tokenizer": named}

    def _quantize(self, ctx: Context, target: Path) -> Metrics:
        from hubforge.llama_cpp.quantizer import quantize

        assert self.unquantized is not None
        artifact = ctx.artifact(self.unquantized)
        made = quantize(
            gguf_file(artifact),
            target,
            self.types[0],
            progress=lambda share: ctx.progress(share, 1.0, "", f"quantizing to {self.types[0]}"),
        )
        if made.fallbacks:
            ctx.warn(
                f"{len(made.fallbacks)} tensors have rows that are no multiple of 256, so {self.types[0]} stored them "
                f"otherwise: {', '.join(made.fallbacks[:3])}{' ...' if len(made.fallbacks) > 3 else ''}"
            )
        inherited = ("converter", "converter_sha256", "pre_tokenizer")
        converted: Metrics = {key: artifact.metrics[key] for key in inherited if key in artifact.metrics}
        return {"quantizer": made.library, "fallbacks": list(made.fallbacks), **converted}

    def _check(self, ctx: Context, target: Path) -> Metrics:
        """Tokens, then logits: what they showed. StepError at the first check that fails."""
        import torch

        from hubforge.llama_cpp.fidelity import check_distance, check_tokens, measure
        from hubforge.llama_cpp.runtime import GgufModel
        from hubforge.models import load_model, load_tokenizer

        tokenizer = load_tokenizer(ctx.path(self.model))
        with GgufModel(target, context=512) as gguf:
            strings = check_tokens(tokenizer, gguf, self.check.strings)
            # float32: in bf16 the model itself would be further off than a Q8_0 is.
            model = load_model(ctx.path(self.model), device=ctx.device, dtype=torch.float32)
            distance = measure(
                model,
                tokenizer,
                gguf,
                self.check.passages,
                progress=lambda done, total: ctx.progress(done, total, "passages", "comparing logits with the model"),
            )
            library = gguf.library
        check_distance(distance, self.check.kl or _limit(self.types[0]), target)
        return {
            "kl_mean": distance.kl_mean,
            "kl_p99": distance.kl_p99,
            "top1": distance.top1,
            "positions": distance.positions,
            "strings": strings,
            "runtime": library,
        }


def gguf_file(artifact: Artifact) -> Path:
    """The .gguf file of an artifact: the file itself, or the only one in its folder."""
    if artifact.path.is_file():
        return artifact.path
    found = sorted(artifact.path.glob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise StepError(f"one .gguf file was expected and {len(found)} are there: {names}", where=str(artifact.path))
    return found[0]


def _limit(type_: str) -> float:
    return next((limit for start, limit in _LIMITS.items() if type_.startswith(start)), _LIMIT_BELOW)
