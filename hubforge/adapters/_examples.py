"""Rows of a dataset as training examples: token ids, and which of them the loss is about.

Text: every token. Pairs of instruction and answer: the answer. Conversations: the assistant's turns, each up to and
with the token that ends it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hubforge.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["text", "instruction", "chat"]
Message = dict[str, str]
IGNORED = -100  # the label that cross-entropy skips
_MESSAGES, _PROMPTS, _INPUT = ("messages", "conversations"), ("prompt", "instruction"), "input"
_ANSWERS = ("completion", "response", "output", "answer")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # As ShareGPT files say it.
_GENERATION = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class Columns:
    """Where a row holds what; "" where it holds no such thing."""

    format: Format
    text: str = ""
    messages: str = ""
    prompt: str = ""
    completion: str = ""

    @property
    def needed(self) -> tuple[str, ...]:
        return tuple(name for name in (self.text, self.messages, self.prompt, self.completion) if name)


@dataclass(frozen=True)
class Example:
    ids: list[int]
    labels: list[int]  # of the same length: the id, or IGNORED


@dataclass(frozen=True)
class Examples:
    """What there is to train on, and what had to be cut or left out."""

    train: list[Example]
    held_out: list[Example]
    truncated: int
    longest: int  # tokens of the longest row before it was cut
    skipped: int  # rows with nothing to learn from

    @property
    def tokens(self) -> int:
        """Tokens of one pass over what is trained on."""
        return sum(len(example.ids) for example in self.train)

    @property
    def loss_tokens(self) -> int:
        """How many of them the loss is about; none can be of the first, which nothing predicts."""
        return sum(label != IGNORED for example in self.train for label in example.labels[1:])


def columns_of(row: Mapping[str, Any], format: Format | None, named: Columns) -> Columns:
    """What is in which column: as named, else by the names such columns usually have. Raises SourceError."""

    def pick(name: str, usual: Sequence[str]) -> str:
        return name or next((column for column in usual if row.get(column) is not None), "")

    messages, prompt = pick(named.messages, _MESSAGES), pick(named.prompt, _PROMPTS)
    completion, text = pick(named.completion, _ANSWERS), pick(named.text, ("text",))
    if format is None:
        said = "chat" if named.messages else "instruction" if named.prompt or named.completion else ""
        said = said or ("text" if named.text else "")
        found = "chat" if messages else "instruction" if prompt and completion else "text" if text else ""
        format = said or found  # type: ignore[assignment]
    have = f"Columns: {', '.join(row)}."
    if format == "chat" and messages:
        return Columns("chat", messages=messages)
    if format == "instruction" and prompt and completion:
        return Columns("instruction", prompt=prompt, completion=completion)
    if format == "text" and text:
        return Columns("text", text=text)
    wanted = {
        "chat": "`messages`, a list of messages; name another with `messages_column`",
        "instruction": "a prompt and a completion; name them with `prompt_column` and `completion_column`",
        "text": "`text`; name another with `dataset_text_field`",
        None: "`messages`, `prompt` with `completion`, or `text`",
        "": "`messages`, `prompt` with `completion`, or `text`",
    }[format]
    raise SourceError(
        f"no column to train on as {format or 'text, instruction or chat'}", mend=f"{have} Wanted: {wanted}."
    )


def make_examples(
    rows: Sequence[Mapping[str, Any]],
    encode: Encoder,
    *,
    max_length: int,
    eval_share: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Examples:
    """The rows as examples, cut to `max_length` tokens; a share of them, drawn from `seed`, held out."""
    held = set(random.Random(seed).sample(range(len(rows)), round(eval_share * len(rows)))) if eval_share else set()
    train: list[Example] = []
    held_out: list[Example] = []
    truncated = longest = skipped = 0
    for number, row in enumerate(rows):
        whole = encode(row, f"row {number + 1}")
        longest, truncated = max(longest, len(whole.ids)), truncated + (len(whole.ids) > max_length)
        example = Example(whole.ids[:max_length], whole.labels[:max_length])
        if all(label == IGNORED for label in example.labels[1:]):
            skipped += 1
        else:
            (held_out if number in held else train).append(example)
        if number % 64 == 63 or number + 1 == len(rows):
            progress(number + 1, len(rows))
    return Examples(train, held_out, truncated, longest, skipped)


class Encoder:
    """Turns rows into whole examples, not cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: Columns, chat_template: bool | None) -> None:
        """chat_template: whether pairs go through the tokenizer's; None: where it has one.

        Raises SourceError when there is no template and it cannot be done without.
        """
        self.tokenizer, self.columns = tokenizer, columns
        self.template: str | None = None  # the tokenizer's own
        if (columns.format == "chat" or chat_template) and not tokenizer.chat_template:
            raise no_template(str(tokenizer.name_or_path))
        self.through_template = columns.format == "chat" or (
            columns.format == "instruction"
            and (bool(tokenizer.chat_template) if chat_template is None else chat_template)
        )
        if self.through_template and not tokenizer.is_fast:
            what = f"{type(tokenizer).__name__} does not say which token came from where, as masking prompts needs"
            raise SourceError(what, where=str(tokenizer.name_or_path), mend="Take a model with a tokenizer.json.")

    def __call__(self, row: Mapping[str, Any], where: str) -> Example:
        columns = self.columns
        for name in columns.needed:
            if row.get(name) is None:
                raise SourceError(f"no {name!r}", where=where, mend=f"Columns: {', '.join(row)}.")
        if columns.format == "text":
            ids = self._with_end(self._ids(_string(row[columns.text], columns.text, where)))
            return Example(ids, list(ids))
        if columns.format == "chat":
            messages = _messages(row[columns.messages], f"{where}, {columns.messages}")
            return self._conversation(messages, 0, where)
        prompt, completion = row[columns.prompt], row[columns.completion]
        if isinstance(prompt, list):
            before = _messages(prompt, f"{where}, {columns.prompt}")
            after = _messages(_listed(completion), f"{where}, {columns.completion}")
            return self._conversation([*before, *after], len(before), where)
        question = _string(prompt, columns.prompt, where)
        if columns.prompt == "instruction" and row.get(_INPUT):
            question = f"{question}\n\n{row[_INPUT]}"
        answer = _string(completion, columns.completion, where)
        if self.through_template:
            pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return self._conversation(pair, 1, where)
        asked = self._ids(f"{question}\n\n")
        replied = self._with_end(self._ids(answer, add_special_tokens=False))
        return Example([*asked, *replied], [IGNORED] * len(asked) + replied)

    def _ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _conversation(self, messages: list[Message], first: int, where: str) -> Example:
        """A conversation; the loss is about the assistant's turns from number `first` on."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
        if not turns:
            raise SourceError("the conversation has no assistant turn to learn from", where=where)
        template = self.template or self.tokenizer.chat_template
        if first == 0 and isinstance(template, str) and _GENERATION.search(template):
            return self._marked(messages, where)
        text = self._render(messages, False, where)
        spans = [self._span(messages, turn, text, where) for turn in turns]
        if None in spans and self._take_training_template():
            return self._conversation(messages, first, where)
        if None in spans:
            mend = "It needs {% generation %} marks around the assistant's words: add them to chat_template.jinja."
            what = "the chat template changes earlier turns when later ones follow, so no turn can be told from it"
            raise SourceError(what, where=where, mend=mend)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        learned = [span for span in spans if span is not None]
        labels = [
            token if end > start and any(a <= start < b for a, b in learned) else IGNORED
            for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        return Example(ids, labels)

    def _span(self, messages: list[Message], turn: int, text: str, where: str) -> tuple[int, int] | None:
        """Where in the text a turn's words begin, and where its end mark ends; None if the template moves them."""
        before = self._render(messages[:turn], True, where)
        upto = self._render(messages[: turn + 1], False, where).rstrip()
        return (len(before), len(upto)) if text.startswith(before) and text.startswith(upto) else None

    def _marked(self, messages: list[Message], where: str) -> Example:
        """By the template's own marks around what the assistant says."""
        encoded = self._apply(messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids = list(encoded["input_ids"])
        mask = encoded["assistant_masks"]
        return Example(ids, [token if said else IGNORED for token, said in zip(ids, mask, strict=True)])

    def _render(self, messages: list[Message], add_generation_prompt: bool, where: str) -> str:
        return str(self._apply(messages, where, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _apply(self, messages: list[Message], where: str, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **how)
        except Exception as error:  # Templates raise in their own words, such as "roles must alternate".
            raise SourceError(f"the chat template refuses it: {error}", where=where) from error

    def _take_training_template(self) -> bool:
        """Whether TRL has a form of this template that keeps earlier turns as they were; takes it."""
        from trl.chat_template_utils import get_training_chat_template

        if self.template is not None:
            return False
        try:
            self.template = get_training_chat_template(self.tokenizer)
        except ValueError:  # TRL does not know the template.
            return False
        return self.template is not None


def no_template(where: str) -> SourceError:
    mend = "Name with `tokenizer` a model whose tokenizer has one, such as the instruct model."
    return SourceError("the tokenizer has no chat template", where=where, mend=mend)


def _string(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise SourceError(f"{column!r} is {type(value).__name__}, not text", where=where)
    return value


def _listed(completion: Any) -> Any:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise SourceError(f"is {type(value).__name__}, not a list of messages", where=where)
    return [_message(item, f"{where}[{number}]") for number, item in enumerate(value)]


def _message(item: Any, where: str) -> Message:
    role = item.get("role", item.get("from")) if isinstance(item, dict) else None
    content = item.get("content", item.get("value")) if isinstance(item, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise SourceError("a message needs `role` and `content`, both text", where=where)
    return {"role": _ROLES.get(role, role), "content": content}


def tokens_of(examples: Iterable[Example]) -> dict[str, list[list[int]]]:
    """The columns that TRL's trainer takes as they are."""
    kept = list(examples)
    return {"input_ids": [example.ids for example in kept], "labels": [example.labels for example in kept]}
