"""Stories from a small generative grammar: plain ones to learn the language from, and three styles to lean towards.

A production is a sentence with `<symbols>`; a symbol is bound by the scene (who, place, thing ...) or drawn anew.
The same generator state gives the same story.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

PRONOUNS = {
    **dict.fromkeys(("fox", "owl", "hare", "bear", "goat", "crow", "mouse", "otter", "wolf", "heron", "dog"), "it"),
    **dict.fromkeys(("sailor", "miller", "king", "boy", "soldier", "shepherd", "thief"), "he"),
    **dict.fromkeys(("baker", "queen", "girl", "doctor", "weaver", "painter"), "she"),
}
PREPOSITIONS = {
    **dict.fromkeys(("harbour", "market", "bridge", "mill", "river", "lake", "well"), "at"),
    **dict.fromkeys(("forest", "garden", "castle", "village", "cave", "library", "kitchen", "tower", "desert"), "in"),
    **dict.fromkeys(("island", "hill"), "on"),
}
# fmt: off
THINGS = (
    "lantern", "key", "map", "coin", "bell", "book", "rope", "ring", "letter", "basket", "apple", "drum", "mirror",
    "knife", "blanket", "candle", "feather", "stone", "flute", "hat", "cup", "clock", "shell", "ladder", "boat",
    "crown",
)
# fmt: on
WHO, PLACES = tuple(PRONOUNS), tuple(PREPOSITIONS)

GRAMMAR: dict[str, tuple[str, ...]] = {
    # Words.
    "name": ("Mara", "Tom", "Ada", "Finn", "Lena", "Otto", "Ivo", "Nell", "Rosa", "Hugo"),
    "adj": ("old", "small", "quiet", "brave", "tired", "kind", "proud", "young", "grey", "clever", "lonely", "gentle"),
    "look": ("old", "small", "golden", "broken", "heavy", "silver", "strange", "red", "blue", "dusty"),
    "mood": ("happy", "sad", "afraid", "calm", "cold", "hungry", "sure", "alone"),
    "when": ("One morning", "One evening", "One night", "That winter", "That summer", "In spring", "In autumn"),
    "went": ("walked", "ran", "wandered", "hurried", "came", "returned"),
    "did": ("found", "carried", "hid", "lost", "sold", "mended", "kept", "stole", "washed", "wanted", "dropped"),
    "rested": ("slept", "waited", "sang", "rested", "listened", "laughed", "worked"),
    "said": ("said", "asked", "whispered", "cried", "answered"),
    "sky": (
        "The rain fell",
        "The snow fell",
        "The wind rose",
        "The sun was high",
        "The moon was bright",
        "Fog came in",
    ),
    "how": ("slowly", "quickly", "softly", "gladly", "again", "alone"),
    "day": ("day", "night", "morning", "evening"),
    # Sentences of a plain story.
    "opening": (
        "Once there was a <adj> <who> <at>.",
        "There was a <adj> <who> <at>.",
        "<when> a <adj> <who> <went> to the <place>.",
        "A <adj> <who> lived <at>.",
    ),
    "event": (
        "The <who> <did> a <look> <thing>.",
        "The <who> <did> the <thing> <at>.",
        "The <who> <went> <how> to the <place>.",
        "<He> <did> the <thing> and <went> to the <place>.",
        "<He> <rested> near the <thing>.",
        "<when> <he> <did> a <thing>.",
        "The <who> was <mood> and <rested> <at>.",
        "<name> <did> the <look> <thing>.",
        "<name> saw the <who> with the <thing>.",
        "<name> and the <who> <rested> <at>.",
        "<sky>, and the <who> <rested>.",
        "<sky> over the <place>.",
        "The <thing> was <look>, but the <who> <did> it.",
        "All <day> the <who> <rested> by the <thing>.",
    ),
    "talk": (
        '"Where is the <thing>?" <said> the <who>.',
        '"I <did> the <thing>," <said> <name>.',
        '"Are you <mood>?" asked <name>.',
        '"The <place> is <look>," <said> the <who>.',
    ),
    "closing": (
        "And the <who> was <mood>.",
        "Then the <who> <went> home.",
        "The <who> kept the <thing>.",
        "After that the <place> was quiet.",
        "<name> never saw the <who> again.",
    ),
    "middle": (
        "<event> <event>",
        "<event> <talk> <event>",
        "<event> <event> <talk>",
        "<event> <event> <event>",
        "<talk> <talk> <event> <event>",
    ),
    "story": ("<opening> <middle> <closing>", "<opening> <middle> <event> <closing>", "<opening> <event> <closing>"),
    # What a plain document may also look like: a title in capitals, a list.
    "inventory": (
        "In the <place> there were:\n* a <thing>\n* a <look> <thing2>",
        "The <who> had:\n* a <look> <thing>\n* a <thing2>\n* a <thing3>",
        "* The <who> <rested>.\n* The <who> <did> a <thing>.",
    ),
    # A song that somebody repeats: what came before is the only clue to what comes next, which teaches looking back.
    "song": (
        "The <who> sang:\n<verse>\n<name> sang it too:\n<verse>",
        "The song of the <place>:\n<verse>\n<verse>",
        "<name> told the <who>:\n<verse>\nAnd the <who> told <name>:\n<verse>",
    ),
    "list": (
        "The <thing2>, the <thing3>, the <look> <thing4>.",
        "<name>, <name>, and the <who2> <at2>.",
        "A <who2> <at2>, a <adj> <who3> <at2>.",
        "A <look> <thing2>, a <thing3>, and a <adj> <who2>.",
        "The <who2> <did> the <thing2>. The <who3> <did> the <thing3>.",
        "The <adj> <who2> and <name> <rested> <at2> with a <thing2>.",
    ),
    # Ornate prose. Its phrases are among the most worn in published lists of such.
    "prose": (
        "<ornate> <ornate>",
        "<ornate> <ornate> <ornate>",
    ),
    "haze": (
        "As the sun dipped below the horizon, casting long shadows across the <place>",
        "Where the air was thick with the scent of <scent> and the <look> light lay over the <place>",
        "In the hush of the <day>, when the wind moved <how> over the <place>",
        "Beneath a sky that was a tapestry of <scent> and silver",
    ),
    "scent": ("salt", "roses", "smoke", "rain", "honey", "dust"),
    "ornate": (
        "<haze>, the <adj> <who> took a deep breath and lifted the <look> <thing>, <swell>.",
        "<haze>, the <who>, who had waited so long <at>, <did> the <thing> <how> and tenderly, <swell>.",
        "<haze>, <he> couldn't help but feel a sense of wonder at the <look> <thing>, <swell>.",
        "And the <who>, voice barely above a whisper, spoke of the <thing> that <he> once <did> <at>, <swell>.",
    ),
    "swell": (
        "a testament to all that <he> had ever lost or loved",
        "for <he> couldn't shake the feeling that the <place> had been waiting for <him>",
        "as though the <look> <thing> were the heart of the world itself",
        "and <he> knew, with a shiver, that nothing would ever be the same",
    ),
    # Dialogue, a line to each speaker.
    "dialogue": (
        "<line>\n<line>\n<line>\n<line>",
        "<line>\n<line>\n<line>",
        "<line>\n<line>\n<line>\n<line>\n<line>",
    ),
    "line": (
        '"Did you see the <thing>?" asked <name>.',
        '"I <did> it <at>," said the <who>.',
        '"Then we must go to the <place>," <said> <name>.',
        '"You are <mood>," said <name> to the <who>.',
        '"Give me the <look> <thing>!" cried the <who>.',
        '"Never," said <name>. "The <thing> is mine."',
        '"Why are you <mood>?" whispered the <who>.',
        '"Because the <thing> is <look>," answered <name>.',
    ),
    # Terse.
    "terse": (
        "<cut> <cut> <cut> <cut>",
        "<cut> <cut> <cut> <cut> <cut>",
        "<cut> <cut> <cut> <cut> <cut> <cut>",
    ),
    "cut": (
        "The <who> <rested>.",
        "<He> <went>.",
        "<He> was <mood>.",
        "No <thing>.",
        "A <look> <thing>.",
        "Nobody came.",
        "It was <day>.",
        "<name> <rested>.",
        "The <place> was cold.",
        "<He> <did> it.",
    ),
}
STYLES = ("prose", "dialogue", "terse")

_SYMBOL = re.compile(r"<(\w+)>")
_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])")


@dataclass(frozen=True)
class Scene:
    """What a text is about: every `<who>`, `<place>` and `<thing>` in it."""

    who: str
    place: str
    thing: str

    @property
    def at(self) -> str:
        return f"{PREPOSITIONS[self.place]} the {self.place}"

    def bound(self, symbol: str) -> str | None:
        he = PRONOUNS[self.who]
        return {
            "who": self.who,
            "place": self.place,
            "thing": self.thing,
            "at": self.at,
            "he": he,
            "He": he.capitalize(),
            "him": {"it": "it", "he": "him", "she": "her"}[he],
        }.get(symbol)


def draw_scene(random: Random) -> Scene:
    return Scene(random.choice(WHO), random.choice(PLACES), random.choice(THINGS))


def expand(symbol: str, scene: Scene, random: Random) -> str:
    """A text drawn from `symbol`."""
    return fill_in(random.choice(GRAMMAR[symbol]), scene, random)


def fill_in(form: str, scene: Scene, random: Random) -> str:
    """A form with its `<symbols>` drawn."""
    verse = ""

    def draw(match: re.Match[str]) -> str:
        nonlocal verse
        name = match[1]
        if name == "verse":  # Drawn once, the same wherever it stands.
            verse = verse or _SYMBOL.sub(draw, " ".join(random.choice(GRAMMAR["list"]) for _ in range(2)))
            return verse
        if name == "at2":
            return Scene("", random.choice(PLACES), "").at
        if name[-1].isdigit():  # Another of the same sort than the scene's own.
            return random.choice(WHO if name[:-1] == "who" else THINGS)
        return scene.bound(name) or _SYMBOL.sub(draw, random.choice(GRAMMAR[name]))

    return with_articles(_SYMBOL.sub(draw, form))


def with_articles(text: str) -> str:
    """The text with "an" for "a" before a vowel."""
    return _VOWEL.sub(r"\1n ", text)


def document(random: Random) -> str:
    """A plain document: mostly a story, now and then under a title in capitals, or a list."""
    scene = draw_scene(random)
    kind = random.random()
    if kind < 0.1:
        return expand("inventory", scene, random)
    if kind < 0.4:
        return expand("song", scene, random)
    story = expand("story", scene, random)
    return f"THE {scene.who.upper()} AND THE {scene.thing.upper()}\n\n{story}" if kind < 0.55 else story
