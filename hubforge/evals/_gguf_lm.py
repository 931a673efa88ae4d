"""A GGUF as lm-eval asks it, in the words lm-eval would use with the Transformers model it was made from.

None of lm-eval's own routes to a GGUF fits: `gguf` ignores max_gen_toks, the HTTP ones lack either log-likelihoods or
chat templates. Imported only once a run has begun: lm-eval brings torch with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lm_eval.models.utils as shared  # noqa: TID253
import numpy as np  # noqa: TID253
from lm_eval.api.model import TemplateLM  # noqa: TID253
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: TID253

from hubforge.evals._subjects import render_chat

if TYPE_CHECKING:
    from hubforge.evals._answers import Answers
    from hubforge.llama_cpp.runtime import GgufModel

_MAX_GEN_TOKS = 256  # where a task names none, as in lm-eval's Hugging Face model


class GgufLM(TemplateLM):  # type: ignore[misc]
    """An in-process GGUF: log-likelihoods, generation, and the chat template that is in the file.

    special_tokens: what the template may ask for, such as bos_token. warn: hears of prompts that had to be cut.
    """

    backend = "causal"

    def __init__(
        self,
        model: GgufModel,
        *,
        special_tokens: Mapping[str, str],
        max_length: int,
        answers: Answers,
        seed: int,
        warn: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.model, self.special_tokens, self.max_length = model, special_tokens, max_length
        self.seed, self.warn = seed, warn
        self.has_cut = False
        self.set_cache_hook(answers)

    @property
    def template(self) -> str | None:
        return self.model.chat_template or None

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.path)

    @property
    def eot_token_id(self) -> int:
        return -1 if self.model.eos_id is None else self.model.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.model.bos_id is None else self.model.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the beginning-of-text token first where the GGUF asks for it and the text has it not."""
        bos = self.special_tokens.get("bos_token")
        add_bos = self.model.adds_bos if add_special_tokens is None else add_special_tokens and self.model.adds_bos
        return self.model.tokenize(string, add_bos=add_bos and not (bos and string.startswith(bos)))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt, rendered by Transformers' own sandboxed renderer: the same text as for the model itself."""
        from jinja2 import TemplateError

        try:
            return self._render(chat_history, add_generation_prompt)
        except TemplateError:
            self.warn("the chat template refuses a system prompt, so it was left out")
            rest = [message for message in chat_history if message["role"] != "system"]
            return self._render(rest, add_generation_prompt)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        template = self.template or ""
        return render_chat(template, messages, self.special_tokens, add_generation_prompt=add_generation_prompt)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return self.cache_hook.complete(  # type: ignore[no-any-return]
            requests, lambda asked: [self._generate(number, request.args) for number, request in enumerate(asked)]
        )

    def _generate(self, number: int, request: tuple[str, dict[str, Any]]) -> str:
        context, asked = request
        settings: dict[str, Any] = dict(shared.normalize_gen_kwargs(asked, _MAX_GEN_TOKS))
        end = self.special_tokens.get("eos_token")
        until = shared.handle_stop_sequences(settings.pop("until", None), eos=end)
        max_gen_toks = settings["max_gen_toks"]
        ids = self._fit(self.tok_encode(context), self.max_length - max_gen_toks)
        text = self.model.generate(
            ids,
            max_tokens=max_gen_toks,
            stop=until,
            temperature=settings["temperature"] if settings["do_sample"] else 0.0,
            seed=self.seed + number,
        )
        text = shared.postprocess_generated_text(text, until, None)
        self.cache_hook.add_partial("generate_until", request, text)
        return str(text)

    def _fit(self, ids: list[int], room: int) -> list[int]:
        if len(ids) > room and not self.has_cut:
            self.has_cut = True
            self.warn(f"a prompt of {len(ids)} tokens was cut to its last {room}: the context is {self.max_length}")
        return ids[-room:]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.cache_hook.expect(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        self.cache_hook.expect(len(requests))
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (strings, context, continuation): the log-probability, and whether greedy decoding would give it.

        Choices of one question that differ in their last token only share one pass through the model.
        """
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: requests[index][1] + requests[index][2])
        seen: list[int] | None = None
        rows = np.empty((0, 0), np.float32)
        for index in order:
            strings, context, continuation = requests[index]
            ids = (context + continuation)[-(self.max_length + 1) :][:-1]
            if ids != seen or len(rows) < len(continuation):
                seen, rows = ids, self.model.logits(ids, start=len(ids) - len(continuation))
            answers[index] = _score(rows[-len(continuation) :], continuation)
            if strings is not None:  # a window of a longer text: counted with the text
                self.cache_hook.add_partial("loglikelihood", strings, answers[index])
        return answers


def _score(rows: np.ndarray, continuation: Sequence[int]) -> tuple[float, bool]:
    """rows: (n, vocab_size) logits, each predicting one of the n tokens."""
    logits = rows.astype(np.float64)
    top = logits.max(axis=1)
    total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    chosen = logits[np.arange(len(continuation)), list(continuation)]
    return float((chosen - total).sum()), bool((logits.argmax(axis=1) == np.asarray(continuation)).all())
