"""Texts drawn from a model or a GGUF, each from a seed of its own: neither batches nor neighbours change it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hubforge.errors import StepError
from hubforge.evals._subjects import context_of, dtype_for, gguf_type, open_gguf, special_tokens
from hubforge.op import Artifact, Context

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hubforge.llama_cpp.runtime import GgufModel


@dataclass(frozen=True)
class Settings:
    """How texts are to be drawn. max_length, max_new_tokens: tokens. dtype: as the op's field."""

    max_new_tokens: int
    max_length: int
    temperature: float
    batch_size: int
    dtype: str
    has_special_tokens: bool = False  # the prompts do, because a chat template wrote them


class Storyteller(Protocol):
    """What can be asked for texts."""

    template: str | None
    special_tokens: dict[str, str]
    facts: dict[str, Any]

    def tell(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, on_step: Callable[[float], None]
    ) -> Iterator[str]:
        """A text for each prompt, in order. on_step hears how many texts are done, in fractions."""


@contextmanager
def open_storyteller(artifact: Artifact, ctx: Context, settings: Settings) -> Iterator[Storyteller]:
    """The model or GGUF of that artifact. Raises StepError where a text may take all the context it has."""
    if artifact.kind == "gguf":
        with open_gguf(artifact, ctx, settings.max_length, seed=0) as (gguf, header):
            facts = {"type": gguf_type(header), "runtime": gguf.library, "max_length": gguf.context}
            _check_room(artifact, ctx, settings, gguf.context)
            yield GgufStoryteller(gguf, special_tokens(gguf, header.metadata), facts)
        return
    from hubforge.models import load_model, load_tokenizer

    model = load_model(artifact.path, device=ctx.device, dtype=dtype_for(settings.dtype, ctx.device))
    max_length = min(settings.max_length, context_of(model.config))
    _check_room(artifact, ctx, settings, max_length)
    dtype = str(model.dtype).removeprefix("torch.")
    facts = {"type": dtype, "runtime": "transformers", "max_length": max_length}
    yield ModelStoryteller(model, load_tokenizer(artifact.path), facts)


def _check_room(artifact: Artifact, ctx: Context, settings: Settings, max_length: int) -> None:
    if settings.max_new_tokens >= max_length:
        raise StepError(
            f"a text may take {settings.max_new_tokens} tokens, and {artifact.name!r} holds {max_length} in all",
            where=ctx.where,
            mend=f"Set `max_new_tokens` to {max_length // 2} or so.",
        )


def seed_of(seed: int, prompt: str, sample: int) -> int:
    """A seed for the k-th text on a prompt, the same for every model, so that they are compared text by text."""
    digest = hashlib.sha256(f"{seed}:{sample}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class GgufStoryteller:
    """Writes one text at a time, drawn by llama_cpp/worker.py from the softmax alone."""

    def __init__(self, model: GgufModel, special_tokens: dict[str, str], facts: dict[str, Any]) -> None:
        self.model, self.special_tokens, self.facts = model, special_tokens, facts
        self.template = model.chat_template or None

    def tell(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, on_step: Callable[[float], None]
    ) -> Iterator[str]:
        room = self.model.context - settings.max_new_tokens
        for prompt, seed in zip(prompts, seeds, strict=True):
            ids = self.model.tokenize(prompt, add_bos=self.model.adds_bos and not settings.has_special_tokens)
            yield self.model.generate(
                ids[-room:], max_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=seed
            )


class ModelStoryteller:
    """Writes a batch of texts at once."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.facts = model, tokenizer, facts
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        self.special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        found: Any = tokenizer.chat_template
        self.template: str | None = found.get("default") if isinstance(found, dict) else found

    def tell(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, on_step: Callable[[float], None]
    ) -> Iterator[str]:
        for first in range(0, len(prompts), settings.batch_size):
            batch = prompts[first : first + settings.batch_size]
            share = len(batch) / (settings.max_new_tokens + 1)
            noise = gumbel_noise(
                seeds[first : first + len(batch)],
                settings.temperature,
                self.model.device,
                lambda step, first=first, share=share: on_step(first + step * share),  # type: ignore[misc]
            )
            yield from self._write(batch, settings, noise)

    def _write(self, prompts: Sequence[str], settings: Settings, noise: Any) -> list[str]:
        from transformers import LogitsProcessorList

        encoded = self.tokenizer(
            list(prompts), return_tensors="pt", padding=True, add_special_tokens=not settings.has_special_tokens
        )
        room = self.facts["max_length"] - settings.max_new_tokens
        ids = encoded["input_ids"][:, -room:].to(self.model.device)
        own, self.model.generation_config = self.model.generation_config, self._plain_config(settings)
        try:
            made = self.model.generate(
                input_ids=ids,
                attention_mask=encoded["attention_mask"][:, -room:].to(self.model.device),
                logits_processor=LogitsProcessorList([noise]),
            )
        finally:
            self.model.generation_config = own
        return [str(text) for text in self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)]

    def _plain_config(self, settings: Settings) -> Any:
        """Greedy, and without the model's own penalties and cuts, which a GGUF would not have either."""
        from transformers import GenerationConfig

        own = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {*(own if isinstance(own, (list, tuple)) else [own]), self.tokenizer.eos_token_id} - {None}
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )


def gumbel_noise(seeds: Sequence[int], temperature: float, device: torch.device, on_step: Callable[[int], None]) -> Any:
    """A logits processor that makes greedy decoding sample at that temperature, each row from its own seed.

    The likeliest token after adding Gumbel noise to logits / temperature is a draw from their softmax (Maddison,
    Tarlow, Minka 2014, arXiv:1411.0030). Two models given the same noise draw the same where they agree, which makes
    their paired difference less noisy.
    """
    import torch
    from transformers import LogitsProcessor

    class Noise(LogitsProcessor):  # type: ignore[misc]
        def __init__(self) -> None:
            self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
            self.step = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.step += 1
            on_step(self.step)
            scores = scores.float()  # (rows, vocabulary)
            if temperature == 0:
                return scores
            uniform = torch.stack([torch.rand(scores.shape[1], generator=g, device=device) for g in self.generators])
            # Kept off 0, whose logarithm is infinite; rand never gives 1, but 1 - 2^-25 rounds to it.
            return scores / temperature - (-uniform.clamp(1e-30, 1 - 2**-24).log()).log()

    return Noise()
