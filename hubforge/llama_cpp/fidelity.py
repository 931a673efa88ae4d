"""How close a GGUF is to the model it was made from: the same tokens for the same text, and nearly the same logits.

A conversion can go wrong without a word: a pre-tokenizer that cuts otherwise, a vocabulary without its scores, a
permuted head. Tokens tell the first two, the divergence of the logits the rest, and what quantization cost besides.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubforge.errors import StepError
from hubforge.llama_cpp.runtime import GgufModel

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Each for a way in which tokenizers differ. Composed characters only: families that normalise (NFC) are known to differ
# in llama.cpp on decomposed ones.
STRINGS = (
    "Hello, world!",
    " leading space",
    "trailing space ",
    "two  spaces,   three,    four",
    "tabs\tand\t\tmore\tof them",
    "lines\nand\n\nempty\n\n\nones\r\nand Windows ones\r\n",
    " \n \n\t\n  indented",
    "I'm, you're, he's, we've, they'd, I'll, don't; I'M, YOU'RE, DON'T",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F 2026-11-20",
    "café naïve Ærøskøbing Straße Łódź Ωμέγα Привет, мир",
    "日本語のテキスト、中文文本，한국어 텍스트",
    "שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี",
    "emoji 🙂 👩‍🚀 🇪🇺 and ½ ② ™ €",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # comment\n',
    "<div class='a'>&nbsp;</div> {\"key\": [1, 2.5, null]} https://example.com/?q=a&b=c",
    "UPPER lower camelCase snake_case kebab-case ALLCAPS123mixed",
    '... --- !!! ??? "quotes" ‘curly’ “double” (parens) [brackets]',
    "zero\u200bwidth, soft\u00adhyphen, non\u00a0breaking, ideographic\u3000space",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "x" + " " * 40 + "y",
)

# Prose, speech, an answer, code and numbers, so that the divergence is not that of one register.
PASSAGES = (
    "The ferry was late, and the harbour had emptied long before its lights came round the point. Ines sat on a coil "
    "of rope and counted the boats by their lamps, as her father had taught her, beginning with the farthest. There "
    "were eleven. When she counted again there were twelve, and the twelfth was moving. It kept no course that a "
    "sailor would keep; it drifted toward the breakwater, turned its side to the swell, and went slowly dark.",
    '"You said you would write," said Tom.\n"I did write. I wrote every week until the snow closed the pass."\n"Then '
    'somebody has a drawer full of your letters, and it is not me." He laughed, but he did not look up from the '
    'engine. "Hand me the small spanner. No, the other one."',
    "Here are three ways to keep bread fresh:\n\n1. Store it in a paper bag at room temperature for up to two days.\n"
    "2. Slice and freeze it, then toast the slices straight from the freezer.\n3. Wrap it in a clean linen cloth; "
    "avoid the refrigerator, where starch recrystallises and the loaf goes stale far sooner.",
    "def moving_average(values, width):\n    total = sum(values[:width])\n    result = [total / width]\n    for old, "
    "new in zip(values, values[width:]):\n        total += new - old\n        result.append(total / width)\n    return "
    "result\n\n# moving_average([1, 2, 3, 4, 5], 2) == [1.5, 2.5, 3.5, 4.5]\n",
)
_WINDOW = 256  # tokens of a passage at most


@dataclass(frozen=True)
class Distance:
    """How far a GGUF's next-token distributions are from the model's, over `positions` of them."""

    kl_mean: float
    """KL(model ‖ GGUF) in nats."""
    kl_p99: float
    top1: float
    """Share of positions at which both find the same token likeliest."""
    positions: int


def check_tokens(tokenizer: PreTrainedTokenizerBase, gguf: GgufModel, strings: Sequence[str] = ()) -> int:
    """How many strings the GGUF gave the same token ids as the model's tokenizer, which is all; else StepError.

    The STRINGS and PASSAGES of this module, words of the vocabulary, the special tokens among text, and `strings`.
    With them what else a prompt depends on: whether it starts with BOS, and the chat template.
    """
    checked = 0
    built_in = [*STRINGS, *PASSAGES, *_words(tokenizer)]
    if gguf.adds_space:
        # SentencePiece puts a space before a text, and Transformers' newer way of it does not where one is already or
        # where a special token is: no fault of the conversion.
        built_in = [text for text in built_in if not text[0].isspace()]
    else:
        built_in += _around_special(tokenizer)
    for text in (*built_in, *strings):
        expected = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        found = gguf.tokenize(text)
        if found != expected:
            raise StepError(
                f"token parity: the GGUF reads {text[:60]!r} as other tokens than the model: "
                f"{_difference(expected, found)}",
                where=str(gguf.path),
                mend="Its vocabulary or pre-tokenizer was converted wrong. A Llama SentencePiece model needs the "
                "base's tokenizer.model beside tokenizer.json; a changed tokenizer.json must keep its family's Split.",
            )
        checked += 1
    starts = list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
    if starts != gguf.adds_bos:
        raise StepError(
            f"token parity: the model's tokenizer {'starts' if starts else 'does not start'} a prompt with BOS, "
            f"the GGUF {'does' if gguf.adds_bos else 'does not'}",
            where=str(gguf.path),
            mend="Set add_bos_token in tokenizer_config.json as its tokenizer.json does.",
        )
    template = tokenizer.chat_template
    if isinstance(template, str) and template != gguf.chat_template:
        raise StepError("chat template: the GGUF's is not the model's", where=str(gguf.path))
    return checked


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    gguf: GgufModel,
    passages: Sequence[str] = (),
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Distance:
    """How far the GGUF's logits are from those of `model`, which computes in its own dtype on its own device.

    passages: text to measure on; default the PASSAGES of this module. Each is cut to 256 tokens.
    """
    import numpy as np
    import torch

    if gguf.vocab_size > model.get_output_embeddings().weight.shape[0]:
        raise StepError(
            f"vocabulary: the GGUF has {gguf.vocab_size} tokens, the model "
            f"{model.get_output_embeddings().weight.shape[0]}",
            where=str(gguf.path),
        )
    divergences, agreements = [], []
    room = getattr(model.config.get_text_config(), "max_position_embeddings", _WINDOW)
    most = min(_WINDOW, gguf.context, room)
    windows = [tokenizer(text, verbose=False)["input_ids"][:most] for text in passages or PASSAGES if text]
    for done, ids in enumerate(windows, 1):
        with torch.inference_mode():
            reference = model(torch.tensor([ids], device=model.device)).logits[0].float().cpu().numpy()
        ours = gguf.logits(ids)
        # Rows that pad the model's matrix beyond its vocabulary are no tokens.
        reference = reference[:, : ours.shape[1]]
        divergences.append(kl_divergence(reference, ours))
        agreements.append(reference.argmax(axis=1) == ours.argmax(axis=1))
        progress(done, len(windows))
    kl = np.concatenate(divergences)
    return Distance(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        top1=float(np.concatenate(agreements).mean()),
        positions=len(kl),
    )


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """sum_i p_i (log p_i - log q_i) of each row, in nats; p = softmax(reference), q = softmax(other). float64."""
    import numpy as np

    rows = np.empty(len(reference))
    for at, (one, two) in enumerate(zip(reference, other, strict=True)):  # By rows: a vocabulary can be 262144 long.
        log_p, log_q = _log_softmax(one), _log_softmax(two)
        rows[at] = (np.exp(log_p) * (log_p - log_q)).sum()
    return rows


def _log_softmax(row: np.ndarray) -> np.ndarray:
    import numpy as np

    shifted = row.astype(np.float64) - row.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _words(tokenizer: Any, most: int = 256, per_string: int = 32) -> list[str]:
    """Up to `most` words, evenly from the whole vocabulary, so that its merges are tried wherever it was trained."""
    tokens = (tokenizer.decode([token]) for token in range(0, len(tokenizer), max(1, len(tokenizer) // (4 * most))))
    words = [word for word in tokens if word.isalpha() or (word[:1] == " " and word[1:].isalpha())]
    words = [word for word in words if unicodedata.is_normalized("NFC", word)][:: max(1, len(words) // most)]
    strings = ["".join(words[at : at + per_string]) for at in range(0, len(words), per_string)]
    return strings + [" ".join(words[at : at + per_string]) for at in range(0, len(words), per_string)]


def _around_special(tokenizer: Any) -> list[str]:
    """Each special token among text, and all of them in a row."""
    tokens = [str(token) for token in tokenizer.all_special_tokens]
    return [f"before{token}after" for token in tokens] + ["".join(tokens)]


def _difference(expected: Sequence[int], found: Sequence[int]) -> str:
    """Where two lists of ids part: "at 3: 17 198 ... against 17 25 198 ..."."""
    at = next((i for i, (one, two) in enumerate(zip(expected, found, strict=False)) if one != two), None)
    at = min(len(expected), len(found)) if at is None else at
    show = [" ".join(map(str, ids[at : at + 4])) or "the end" for ids in (expected, found)]
    return f"from token {at} on, {show[0]} in the model, {show[1]} in the GGUF"


def check_distance(distance: Distance, limit: float, path: Path) -> None:
    """StepError when the mean divergence is over the limit."""
    if not distance.kl_mean <= limit:  # so that NaN fails
        raise StepError(
            f"logits: the mean KL divergence from the model is {distance.kl_mean:.3g} over {distance.positions} "
            f"positions, and may be {limit:g} (99th percentile {distance.kl_p99:.3g}, top-1 agreement "
            f"{distance.top1:.1%})",
            where=str(path),
            mend="Far more than its type costs means a wrong conversion. `check: {kl: ...}` sets another limit.",
        )
