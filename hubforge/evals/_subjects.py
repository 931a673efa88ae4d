"""What an eval is run on: a Transformers model or a GGUF file, and the facts of it that belong to its scores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hubforge.errors import StepError
from hubforge.op import Artifact, Context

if TYPE_CHECKING:
    import torch

    from hubforge.llama_cpp.header import Header
    from hubforge.llama_cpp.runtime import GgufModel

T = TypeVar("T", bound=Any)
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt")
# general.file_type: enum llama_ftype of llama.cpp's include/llama.h.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
}  # fmt: skip


def with_baseline(op: T) -> T:
    """The eval, with its baseline among what it is run on."""
    if op.baseline is None or op.baseline in op.on:
        return op
    return op.model_copy(update={"on": [*op.on, op.baseline]})  # type: ignore[no-any-return]


def weights_of(artifact: Artifact) -> dict[str, Any]:
    """Which bytes were evaluated: the sha256 of each file of weights, and one of them all."""
    files = sorted((file for file in artifact.files if file.path.endswith(_WEIGHTS)), key=lambda file: file.path)
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in files)
    return {
        "weights": {file.path: file.sha256 for file in files},
        "weights_sha256": hashlib.sha256(lines.encode()).hexdigest() if files else None,
    }


def dtype_for(name: str, device: str) -> torch.dtype | None:
    """What to compute in; None is the checkpoint's own type. On a CPU bf16 is slow, and rounds every step."""
    import torch

    if name == "auto":
        return torch.float32 if device == "cpu" else None
    return getattr(torch, name)


def context_of(config: Any) -> int:
    """Tokens the model was made for; a multimodal one says so of its text model."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1 << 30)


def gguf_file(artifact: Artifact) -> Path:
    """The .gguf file of an artifact: itself, or the only one (or first shard) in its folder."""
    if artifact.path.is_file():
        return artifact.path
    found = sorted(artifact.path.glob("**/*.gguf"))
    shards = [path for path in found if "-of-" in path.name]
    if len(found) == 1 or (found and len(shards) == len(found) and "-00001-of-" in found[0].name):
        return found[0]
    what = "no .gguf file" if not found else f"{len(found)} .gguf files"
    raise StepError(
        f"{artifact.name!r} holds {what}", where=str(artifact.path), mend="Name one file: `gguf: ...` with `file:`."
    )


def gguf_type(header: Header) -> str:
    """The quant type the file says it is of, "Q6_K"; else that of most of its tensors."""
    named = _FILE_TYPES.get(header.metadata.get("general.file_type", -1))
    return named or next(iter(header.count_types()), "")


@contextmanager
def open_gguf(artifact: Artifact, ctx: Context, max_length: int, seed: int) -> Iterator[tuple[GgufModel, Header]]:
    """The GGUF, loaded, with a context of at most `max_length` tokens and what it was made for; and its header."""
    from hubforge.llama_cpp.header import read_header
    from hubforge.llama_cpp.runtime import GgufModel

    path = gguf_file(artifact)
    header = read_header(path)
    own = header.metadata.get(f"{header.metadata.get('general.architecture')}.context_length")
    context = min(max_length, int(own)) if own else max_length
    with GgufModel(path, context=context, gpu=ctx.device != "cpu", seed=seed) as model:
        yield model, header


def special_tokens(model: GgufModel, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the GGUF's special tokens, by the names Transformers gives them."""
    ids = {
        "bos_token": model.bos_id,
        "eos_token": model.eos_id,
        "unk_token": metadata.get("tokenizer.ggml.unknown_token_id"),
        "pad_token": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {name: model.detokenize([number], special=True) for name, number in ids.items() if number is not None}


def check_template(asked: bool | None, artifact: Artifact | None, where: str) -> None:
    """As `chat_or_not`, before anything is loaded: raise StepError where a model's files have no template."""
    if not asked or artifact is None or artifact.kind != "model":
        return
    config = artifact.path / "tokenizer_config.json"
    if (artifact.path / "chat_template.jinja").is_file() or (artifact.path / "chat_template.json").is_file():
        return
    chat_or_not(
        asked, "?" if config.is_file() and b'"chat_template"' in config.read_bytes() else None, artifact.name, where
    )


def chat_or_not(asked: bool | None, template: str | None, name: str, where: str) -> bool:
    """Whether prompts go through the chat template: as asked, else where there is one."""
    if asked and not template:
        raise StepError(
            f"{name!r} has no chat template, and `apply_chat_template` is true",
            where=where,
            mend="Leave it out: a model without template is then asked in plain text.",
        )
    return bool(template) if asked is None else asked


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt as Transformers' sandboxed renderer writes it, whether the template came with a model or in a GGUF.

    Raises jinja2.TemplateError where the template refuses the messages, as some do with a system turn.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [list(messages)],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
        **special_tokens,
    )
    return str(rendered[0])
