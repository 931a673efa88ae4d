"""A Transformers model as lm-eval asks it. Imported only once a run has begun: lm-eval brings torch with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM  # noqa: TID253

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hubforge.evals._answers import Answers


class HfLM(HFLM):  # type: ignore[misc]
    """lm-eval's own Hugging Face model, silent, on a model that is already loaded."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int,
        answers: Answers,
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length
        )
        self.set_cache_hook(answers)

    @property
    def template(self) -> str | None:
        """The chat template in use; None when there is none."""
        found = self.tokenizer.chat_template
        return found.get("default") if isinstance(found, dict) else found

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.cache_hook.expect(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        self.cache_hook.expect(len(requests))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        return super()._loglikelihood_tokens(  # type: ignore[no-any-return]
            requests, disable_tqdm=True, override_bs=override_bs
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        generate = super().generate_until
        return self.cache_hook.complete(  # type: ignore[no-any-return]
            requests, lambda asked: generate(asked, disable_tqdm=True)
        )

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the base class would ask the Hub for a commit."""
        return {}
