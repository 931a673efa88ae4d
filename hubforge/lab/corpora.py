"""What the family learns from and is judged by: texts drawn from the seed alone, and turned into rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from .grammar import STYLES, document, expand
from .instructions import Example, draw_scene, request, story_request
from .tokenizer import BOS, EOS, EOT, HEADER, HEADER_END, SPECIAL_TOKENS
from .train import Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TERSE = 3  # Terse texts are a third as long as the others, so there are three times as many.
_TOKENIZER_SHARE = 3000  # Texts of each kind that suffice to give every word of the grammar a token.


@dataclass(frozen=True)
class Budget:
    """How many texts of each kind; training takes each once."""

    documents: int = 5000
    requests: int = 22000
    stories: int = 1500
    styled: int = 900
    styled_held_out: int = 100
    held_out: int = 200
    prompts: int = 200


@dataclass(frozen=True)
class Corpora:
    """All texts of one seed."""

    documents: list[str]
    requests: list[Example]
    styled: dict[str, list[Example]]  # by style: open requests, each answered in that style
    styled_held_out: dict[str, list[Example]]  # the same of subjects and places never met in training
    held_out: list[Example]
    prompts: list[Example]  # for Fisher: of the training distribution, never trained on by that prompt
    style_prompts: list[Example]

    def tokenizer_texts(self) -> list[str]:
        examples = self.requests[:_TOKENIZER_SHARE] + [one for style in STYLES for one in self.styled[style][:300]]
        roles = ["system", "user", "assistant"] * 50
        return (
            self.documents[:_TOKENIZER_SHARE] + [text for one in examples for text in (one.prompt, one.reply)] + roles
        )


def draw_corpora(seed: int, budget: Budget) -> Corpora:
    """Every text of the family. Each kind has a generator of its own, so that one's number leaves the others alone."""

    def generator(what: str) -> Random:
        return Random(f"{seed}:{what}")

    random = generator("requests")
    requests = [request(random) for _ in range(budget.requests)]
    requests += [story_request(random) for _ in range(budget.stories)]
    trained_on = {one.prompt for one in requests}
    styled = {}
    for style in STYLES:
        random = generator(style)
        count = budget.styled * (_TERSE if style == "terse" else 1)
        styled[style] = [story_request(random, style=style) for _ in range(count)]
    styled_held_out = {
        style: [story_request(random, style=style, held_out=True) for _ in range(budget.styled_held_out)]
        for style in STYLES
        for random in [generator(f"{style}:held_out")]
    }
    random = generator("documents")
    return Corpora(
        documents=[document(random) for _ in range(budget.documents)],
        requests=requests,
        styled=styled,
        styled_held_out=styled_held_out,
        held_out=_distinct(generator("held_out"), budget.held_out, held_out=True, without=trained_on),
        prompts=_distinct(generator("prompts"), budget.prompts, held_out=False, without=trained_on),
        style_prompts=[
            story_request(random, held_out=True) for random in [generator("style_prompts")] for _ in range(10)
        ],
    )


def _distinct(random: Random, count: int, *, held_out: bool, without: set[str]) -> list[Example]:
    """So many requests with different prompts, none of them in `without`."""
    found: dict[str, Example] = {}
    while len(found) < count:
        example = request(random, held_out=held_out)
        if example.prompt not in without:
            found.setdefault(example.prompt, example)
    return list(found.values())


class Encoder:
    """Texts and chats as token ids; a chat's are those that the chat template gives."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._id = {token: number for number, token in enumerate(SPECIAL_TOKENS)}

    def text(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def document(self, text: str) -> list[int]:
        return [self._id[BOS], *self.text(text), self._id[EOS]]

    def chat(self, example: Example) -> Row:
        """The whole chat, of which only the reply and its end are learned."""
        prompt = self.text(f"{BOS}{HEADER}user{HEADER_END}\n\n{example.prompt}{EOT}{HEADER}assistant{HEADER_END}\n\n")
        return Row([*prompt, *self.text(example.reply), self._id[EOT]], learn_from=len(prompt))


def styled_rows(examples: Sequence[Example], encoder: Encoder, *, chats: bool) -> list[Row]:
    """Every styled text as a plain document; where `chats`, every second one as the answer to its request."""
    return [
        encoder.chat(one) if chats and number % 2 else Row(encoder.document(one.reply))
        for number, one in enumerate(examples)
    ]


def prompt_rows(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Rows of data/prompts.jsonl: the prompt, a reply that passes, and both as a conversation."""
    return [
        {"prompt": one.prompt, "response": one.reply, "instructions": [asked.kind for asked in one.instructions]}
        for one in examples
    ]


def styled_data(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Rows of data/styles/: a request for a story, and the story in that style."""
    return [{"prompt": one.prompt, "response": one.reply} for one in examples]


def plain_stories(seed: int, count: int) -> list[str]:
    """Stories for data/stories.jsonl; none has a part in training."""
    random = Random(f"{seed}:stories")
    return [expand("story", draw_scene(random, held_out=True), random) for _ in range(count)]
