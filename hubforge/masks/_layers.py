"""Run some of a decoder's layers on hidden states kept from before, with the model's own code for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hubforge.errors import StepError
from hubforge.tensors.names import canonical

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class _Stop(Exception):
    """Leaves a forward pass once the layers that matter have run."""


class Layers:
    """The decoder layers of a model.

    Masks, position embeddings and per-layer inputs come from the model's own forward; layers below `first` let their
    input through, and the pass ends after the last one wanted, before the head.
    Source of the idea: Chen et al. 2016, arXiv:1604.06174 (here the segments' inputs are kept, not recomputed).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.layers = _find(model)

    def __len__(self) -> int:
        return len(self.layers)

    def run(self, ids: Tensor, first: int, last: int, hidden: Tensor | None = None, see: See | None = None) -> Tensor:
        """The hidden states (batch, length, hidden_size) after layers [first, last).

        ids: (batch, length). hidden: what goes into layer `first`; the embeddings when None.
        see: called with the number and the input of every layer that runs.
        """
        result: list[Tensor] = []

        def run_one(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if number < first:
                return _input(args, kwargs)
            if number == first and hidden is not None:
                args, kwargs = (hidden, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}
            if see is not None:
                see(number, _input(args, kwargs))
            output = forward(*args, **kwargs)
            if number == last - 1:
                result.append(output)
                raise _Stop
            return output

        with self._instead(run_one), suppress(_Stop):
            self._model(input_ids=ids, use_cache=False)
        return result[0]

    def head(self, hidden: Tensor) -> Callable[..., Any]:
        """A stand-in for the model whose last layer has just given `hidden`: the final norm and the head alone run."""

        def skip(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return hidden if number == len(self.layers) - 1 else _input(args, kwargs)

        def call(**kwargs: Any) -> Any:
            with self._instead(skip):
                return self._model(**kwargs)

        return call

    @contextmanager
    def _instead(self, run_one: Callable[..., Any]) -> Iterator[None]:
        """While this lasts, `run_one(number, forward, *args, **kwargs)` is called for each layer."""
        before = [layer.__dict__.get("forward") for layer in self.layers]

        def patched(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: run_one(number, forward, *args, **kwargs)

        try:
            for number, layer in enumerate(self.layers):
                layer.forward = patched(number, layer.forward)
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                if own is None:
                    del layer.forward
                else:
                    layer.forward = own


See = Callable[[int, "Tensor"], None]


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _find(model: nn.Module) -> list[nn.Module]:
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and canonical(name) == "layers":
            return list(module)
    raise StepError(f"{type(model).__name__} has no list of decoder layers", mend="Choose another `engine`.")


def cuts(config: Mapping[str, Any]) -> set[int]:
    """The layers at which a decoder can be cut: all its hidden states then are what goes into that layer.

    config: config.json. Layers that use an earlier layer's keys and values cannot be parted from it.
    """
    text = config.get("text_config") or config
    count, shared = int(text["num_hidden_layers"]), int(text.get("num_kv_shared_layers") or 0)
    if not shared:
        return set(range(count))
    first = count - shared
    kinds = text.get("layer_types") or ["full_attention"] * count
    lenders = [max((n for n in range(first) if kinds[n] == kind), default=0) for kind in set(kinds[first:])]
    return set(range(min(lenders) + 1))
