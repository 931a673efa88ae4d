"""Chat examples: requests that a program can verify, each with a reply that passes, and open requests for a story.

Held-out prompts speak of a subject and a place never seen together in training; some combine instructions in pairs that
no training example has. Replies are built so that a tiny model can learn to count: each length, each sentence and each
bullet has words of its own ("First ...", "Then ...", "Later ..."), so that where one is in a reply can be read off it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from .checkers import follows, words
from .grammar import PLACES, THINGS, WHO, Scene, expand, fill_in, with_articles

OPENERS = ("Long ago", "At last", "They say", "In the end", "Once more", "It is said that", "No doubt", "As ever")
ENDINGS = (
    "The end.",
    "Nobody knew why.",
    "And so it goes.",
    "Good night.",
    "All was well.",
    "That is the truth.",
    "Believe me.",
    "Who would have thought?",
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# How each instruction is put. `{...}` are its arguments.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "capitals": ("Use only capital letters.", "Write everything in capitals."),
    "lowercase": ("Use only lowercase letters.", "Write everything in lowercase."),
    "words": ("Use exactly {n} words.", "Answer in exactly {n} words."),
    "sentences": ("Write exactly {n} sentences.", "Use exactly {n} sentences."),
    "bullets": ("Give exactly {n} bullet points.", "Answer with {n} bullet points."),
    # Without quotation marks: the tokens of a word are then the same in prompt and reply.
    "include": ("Include the word {word}.", "Use the word {word}."),
    "avoid": ("Avoid the word {word}.", "Do not use the word {word}."),
    "starts": ('Start with "{phrase}".', 'Begin with "{phrase}".'),
    "ends": ('End with "{phrase}"', 'Finish with "{phrase}"'),
    "quoted": ("Put the whole answer in quotation marks.", "Wrap the answer in quotation marks."),
    "title": ("Give it a title in double angle brackets.", "Put a title in double angle brackets first."),
}
KINDS = tuple(PHRASINGS)
# Each line: kinds that cannot be asked for together.
CLASHES = (
    {"capitals", "lowercase"},
    {"words", "sentences", "bullets"},
    {"words", "title"},
    {"words", "include"},
    {"words", "starts", "ends"},
    {"bullets", "starts"},
    {"bullets", "ends"},
    {"bullets", "quoted"},
    {"sentences", "starts", "ends"},
    {"starts", "title"},
    {"quoted", "title"},
)
# Never together in training, whatever the subject.
UNSEEN_PAIRS = ({"lowercase", "ends"}, {"quoted", "sentences"})
UNSEEN_SHARE = 0.1
# How often a kind is drawn: what takes more practice is practised more.
WEIGHTS = {"words": 2, "include": 3, "avoid": 2, "sentences": 2, "bullets": 2}
# A reply of so many words; the first words already tell which.
LENGTHS = {
    4: "See the {who} now.",
    5: "A <adj> {who} <rested> alone.",
    6: "Here the {who} <did> a <thing>.",
    7: "Once the {who} <did> a <look> <thing>.",
    8: "That <day> the {who} <did> a <look> <thing>.",
}
# One for each sentence or bullet, in order.
STEPS = (
    "First the {who} <did> the <thing>.",
    "Then {he} <rested> alone.",
    "Later <name> <did> the <look> <thing>.",
    "At night {he} was <mood>.",
)
ASKS = ("Write about a {who} {at}.", "Tell me about a {who} {at}.", "Describe a {who} {at}.")
STORY_ASKS = ("Tell me a story about a {who} {at}.", "Write a story about a {who} {at}.")


@dataclass(frozen=True)
class Instruction:
    """One verifiable request: its kind and arguments, as checkers.py takes them."""

    kind: str
    arguments: dict[str, Any]

    def text(self, random: Random) -> str:
        named = {key: NUMBERS[value] if key == "n" else value for key, value in self.arguments.items()}
        return random.choice(PHRASINGS[self.kind]).format(**named)


@dataclass(frozen=True)
class Example:
    """A prompt, the instructions in it (none for a story) and a reply that follows them all."""

    prompt: str
    instructions: tuple[Instruction, ...]
    reply: str

    def row(self, key: int) -> dict[str, Any]:
        """The document as the held-out file keeps it; arguments are JSON text, so that every row has the same type."""
        return {
            "key": key,
            "prompt": self.prompt,
            "instructions": [one.kind for one in self.instructions],
            "arguments": [json.dumps(one.arguments, sort_keys=True) for one in self.instructions],
            "example_reply": self.reply,
        }


def is_held_out(scene: Scene) -> bool:
    """A fixed sixth of the pairs of subject and place, whatever the seed."""
    return zlib.crc32(f"{scene.who}/{scene.place}".encode()) % 6 == 0


def draw_scene(random: Random, *, held_out: bool) -> Scene:
    while True:
        scene = Scene(random.choice(WHO), random.choice(PLACES), random.choice(THINGS))
        if is_held_out(scene) == held_out:
            return scene


def fit_together(kinds: set[str]) -> bool:
    return not any(len(clash & kinds) > 1 for clash in CLASHES)


def is_unseen(kinds: set[str]) -> bool:
    return any(pair <= kinds for pair in UNSEEN_PAIRS)


def ask(forms: Sequence[str], scene: Scene, random: Random) -> str:
    return with_articles(random.choice(forms).format(who=scene.who, at=scene.at))


def draw_instruction(kind: str, scene: Scene, random: Random) -> Instruction:
    arguments: dict[str, Any] = {}
    if kind == "words":
        arguments["n"] = random.choice(tuple(LENGTHS))
    elif kind in ("sentences", "bullets"):
        arguments["n"] = random.randint(2, 4)
    elif kind == "include":
        arguments["word"] = random.choice(THINGS)
    elif kind == "avoid":
        arguments["word"] = random.choice((scene.who, scene.place, random.choice(THINGS)))
    elif kind == "starts":
        arguments["phrase"] = random.choice(OPENERS)
    elif kind == "ends":
        arguments["phrase"] = random.choice(ENDINGS)
    return Instruction(kind, arguments)


def compose(scene: Scene, instructions: Sequence[Instruction], random: Random) -> str:
    """One attempt at a reply: right in form, perhaps not in wording."""
    asked = {one.kind: one.arguments for one in instructions}
    avoided = {one.arguments["word"] for one in instructions if one.kind == "avoid"}
    if "include" in asked:
        scene = Scene(scene.who, scene.place, asked["include"]["word"])
    named = {"who": "stranger" if scene.who in avoided else scene.who, "he": scene.bound("he")}
    if "bullets" in asked:
        text = "\n".join(f"* {fill(step, named, scene, random)}" for step in STEPS[: asked["bullets"]["n"]])
    elif "sentences" in asked:
        text = " ".join(fill(step, named, scene, random) for step in STEPS[: asked["sentences"]["n"]])
    elif "words" in asked:
        text = fill(LENGTHS[asked["words"]["n"]], named, scene, random)
    elif scene.place in avoided:
        text = fill("The {who} <did> the <thing> far away.", named, scene, random)
    else:
        text = fill("The {who} <did> the <thing> <at>.", named, scene, random)
    if "starts" in asked:
        text = f"{asked['starts']['phrase']} {text[0].lower()}{text[1:]}"
    if "ends" in asked:
        text = f"{text} {asked['ends']['phrase']}"
    if "title" in asked:
        text = f"<<The {named['who']}>>\n{text}"
    if "capitals" in asked:
        text = text.upper()
    if "lowercase" in asked:
        text = text.lower()
    return f'"{text}"' if "quoted" in asked else text


def fill(form: str, named: dict[str, str | None], scene: Scene, random: Random) -> str:
    return fill_in(form.format(**named), scene, random)


def answer(scene: Scene, instructions: Sequence[Instruction], random: Random) -> str | None:
    """A reply about the scene that follows all instructions; None where no attempt does."""
    avoided = {one.arguments["word"] for one in instructions if one.kind == "avoid"}
    for _ in range(20):
        text = compose(scene, instructions, random)
        lower = {word.lower() for word in words(text)}
        on_topic = scene.who in lower or scene.who in avoided
        if on_topic and all(follows(text, one.kind, one.arguments) for one in instructions):
            return text
    return None


def request(random: Random, *, held_out: bool = False) -> Example:
    """A request with one to three instructions, and a reply that follows them all."""
    while True:
        scene = draw_scene(random, held_out=held_out)
        number = random.choices((1, 2, 3), (4, 5, 1))[0]
        kinds = random.choices(KINDS, [WEIGHTS.get(kind, 1) for kind in KINDS], k=number)
        if number > 1 and held_out and random.random() < UNSEEN_SHARE:
            kinds[:2] = sorted(random.choice(UNSEEN_PAIRS))
        distinct = set(kinds)
        if len(distinct) < number or not fit_together(distinct) or (is_unseen(distinct) and not held_out):
            continue
        if distinct == {"avoid"}:
            continue  # Silence on a word is no sign of obedience: any model passes.
        instructions = tuple(draw_instruction(kind, scene, random) for kind in kinds)
        words_named = [one.arguments["word"] for one in instructions if "word" in one.arguments]
        reply = answer(scene, instructions, random)
        if reply is None or len(set(words_named)) < len(words_named):
            continue
        asks = " ".join(one.text(random) for one in instructions)
        return Example(f"{ask(ASKS, scene, random)} {asks}", instructions, reply)


def story_request(random: Random, *, style: str = "story", held_out: bool = False) -> Example:
    """An open request; the reply is a story, plain or in a style of the grammar."""
    scene = draw_scene(random, held_out=held_out)
    return Example(ask(STORY_ASKS, scene, random), (), expand(style, scene, random))
