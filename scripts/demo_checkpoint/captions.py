"""Captions of the sounds: many phrasings each, some of which are kept back from training.

A held-out caption uses a sentence pattern, and pairs of a name and an adjective, that no training caption has; each
of its words occurs in training captions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from .sounds import check_names


@dataclass(frozen=True)
class Words:
    """The words for one kind of sound."""

    one: tuple[str, ...]  # names that take an article
    many: tuple[str, ...]  # plurals
    mass: tuple[str, ...]  # names without article or plural
    verbs: tuple[tuple[str, str, str], ...]  # "it rings", "they ring", "ringing"


_WORDS: Final[Mapping[str, Words]] = MappingProxyType(
    {
        "beep": Words(
            ("beep", "electronic beep", "beeping tone", "alarm beep"),
            ("beeps", "electronic beeps", "beeping tones"),
            ("beeping", "electronic beeping"),
            (("repeats", "repeat", "repeating"), ("sounds", "sound", "sounding"), ("goes on", "go on", "going on")),
        ),
        "siren": Words(
            ("siren", "police siren", "ambulance siren", "wailing siren", "emergency siren"),
            ("sirens", "police sirens"),
            (),
            (("wails", "wail", "wailing"), ("howls", "howl", "howling"), ("blares", "blare", "blaring")),
        ),
        "sweep": Words(
            ("sweep", "tone sweep", "sweeping tone", "laser sound", "synthesizer sweep"),
            ("sweeps", "tone sweeps", "sweeping tones", "laser sounds"),
            (),
            (("repeats", "repeat", "repeating"), ("zaps", "zap", "zapping"), ("plays", "play", "playing")),
        ),
        "hiss": Words(
            ("hiss", "hiss of steam", "hissing noise", "hiss of air"),
            (),
            ("hissing", "static", "white noise", "hissing steam"),
            (("goes on", "go on", "going on"), ("sounds", "sound", "sounding"), ("hisses", "hiss", "hissing")),
        ),
        "rain": Words(
            ("rain shower", "shower of rain"),
            ("raindrops", "drops of rain"),
            ("rain", "falling rain", "rainfall", "pattering rain"),
            (
                ("patters", "patter", "pattering"),
                ("comes down", "come down", "coming down"),
                ("pours", "pour", "pouring"),
            ),
        ),
        "wind": Words(
            ("gusty wind", "howling wind", "storm wind"),
            ("gusts of wind", "strong winds"),
            ("wind", "blowing wind", "windy weather"),
            (("blows", "blow", "blowing"), ("howls", "howl", "howling"), ("moans", "moan", "moaning")),
        ),
        "waves": Words(
            (),
            ("ocean waves", "waves", "sea waves", "waves on a beach", "waves on the shore"),
            ("surf", "ocean surf", "sea surf"),
            (
                ("rolls in", "roll in", "rolling in"),
                ("crashes", "crash", "crashing"),
                ("washes in", "wash in", "washing in"),
            ),
        ),
        "engine": Words(
            ("engine", "motor", "running engine", "engine hum", "machine hum", "car engine"),
            (),
            ("engine noise", "motor buzz"),
            (("hums", "hum", "humming"), ("runs", "run", "running"), ("buzzes", "buzz", "buzzing")),
        ),
        "clock": Words(
            ("clock", "ticking clock", "wall clock", "clock tick"),
            ("clock ticks", "ticks of a clock"),
            ("ticking", "clock ticking"),
            (
                ("ticks", "tick", "ticking"),
                ("goes tick tock", "go tick tock", "going tick tock"),
                ("runs", "run", "running"),
            ),
        ),
        "heartbeat": Words(
            ("heartbeat", "beating heart", "human heart", "heart", "thumping heart"),
            ("heartbeats", "heart sounds"),
            (),
            (("beats", "beat", "beating"), ("thumps", "thump", "thumping"), ("pounds", "pound", "pounding")),
        ),
        "footsteps": Words(
            (),
            ("footsteps", "steps", "footsteps on a floor", "steps of a person", "walking feet", "steps on the ground"),
            ("walking",),
            (("goes by", "go by", "going by"), ("passes", "pass", "passing"), ("moves on", "move on", "moving on")),
        ),
        "knocking": Words(
            ("knock on a door", "triple knock", "knock on wood"),
            ("knocks", "knocks on a door", "three knocks", "knocks on wood"),
            ("knocking", "knocking on a wooden door", "door knocking"),
            (
                ("repeats", "repeat", "repeating"),
                ("sounds", "sound", "sounding"),
                ("comes again", "come again", "coming again"),
            ),
        ),
        "drums": Words(
            ("drum beat", "drum loop", "drum kit", "drum rhythm"),
            ("drums", "rock drums"),
            ("drumming",),
            (("plays", "play", "playing"), ("keeps time", "keep time", "keeping time"), ("beats", "beat", "beating")),
        ),
        "pluck": Words(
            ("guitar scale", "plucked string scale", "guitar melody", "plucked melody", "harp scale"),
            ("plucked strings", "guitar notes", "plucked notes"),
            (),
            (
                ("plays", "play", "playing"),
                ("rings out", "ring out", "ringing out"),
                ("repeats", "repeat", "repeating"),
            ),
        ),
        "organ": Words(
            ("organ chord", "church organ", "organ", "pipe organ", "chord on an organ"),
            ("organ pipes",),
            ("organ music",),
            (("plays", "play", "playing"), ("sounds", "sound", "sounding"), ("drones", "drone", "droning")),
        ),
        "bell": Words(
            ("bell", "church bell", "ringing bell", "metal bell", "tolling bell"),
            ("bells", "church bells"),
            (),
            (("rings", "ring", "ringing"), ("tolls", "toll", "tolling"), ("chimes", "chime", "chiming")),
        ),
        "telephone": Words(
            ("telephone", "ringing telephone", "phone", "ringing phone", "telephone ring", "phone ringtone"),
            ("telephone rings",),
            (),
            (("rings", "ring", "ringing"), ("calls", "call", "calling"), ("goes off", "go off", "going off")),
        ),
        "birdsong": Words(
            ("bird", "singing bird", "songbird", "chirping bird"),
            ("birds", "chirping birds", "bird chirps"),
            ("birdsong", "bird song"),
            (("chirps", "chirp", "chirping"), ("sings", "sing", "singing"), ("tweets", "tweet", "tweeting")),
        ),
    }
)

# Adjectives before the name, then phrases that come last, which start with a space. Any four of them in a row hold
# one that is kept back and three that are not.
_SYNONYMS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "high": ("high-pitched", "high", "shrill", "treble", " at a high pitch", " with a high tone"),
        "low": ("low-pitched", "low", "deep", "bass", " at a low pitch", " with a deep tone"),
        "fast": ("fast", "quick", "rapid", "hurried", " at a fast pace", " at a rapid speed"),
        "slow": ("slow", "unhurried", "leisurely", "sluggish", " at a slow pace", " at a leisurely speed"),
        "rising": ("rising", "ascending", "climbing", "upward", " going up", " rising in pitch"),
        "falling": ("falling", "descending", "dropping", "downward", " going down", " falling in pitch"),
        "steady": ("steady", "constant", "continuous", "unbroken", " without a break", " at a steady level"),
        "pulsing": ("pulsing", "pulsating", "throbbing", "intermittent", " in pulses", " switching on and off"),
    }
)

_TRAINING: Final = (
    "{thing}{tail}",
    "{thing} {doing}{tail}",
    "{thing} {does}{tail}",
    "the sound of {thing}{tail}",
    "the sound of {thing} {doing}{tail}",
    "a recording of {thing}{tail}",
    "a recording of {thing} {doing}{tail}",
    "a clip of {thing} {doing}{tail}",
    "audio of {thing}{tail}",
    "we hear {thing} {doing}{tail}",
    "you can hear {thing}{tail}",
    "{thing}{tail} can be heard",
    "this is the sound of {thing}{tail}",
    "{thing} {does}{tail} the whole time",
    "{thing} {doing}{tail}, nothing else",
    "only {thing}{tail}",
)
_HELD_OUT: Final = (
    "this is a recording of {thing}{tail}",
    "we can hear {thing} {doing}{tail}",
    "a clip of the sound of {thing}{tail}",
    "only the sound of {thing}{tail} can be heard",
    "you hear nothing else, only {thing} {doing}{tail}",
    "the whole time {thing} {does}{tail}",
    "audio of the sound of {thing} {doing}{tail}",
)
_MIXTURE_TRAINING: Final = (
    "{first} with {second} in the background",
    "{first_clause} while {second_clause}",
    "{first_clause} as {second_clause} in the background",
    "{first} over {second}",
    "{first}, {second} behind it",
    "{first} against a background of {second}",
    "{first} in front of {second}",
    "the sound of {first} with {second} behind",
    "{first}, and {second} in the distance",
    "in the distance {second}, in front {first}",
    "{second} in the background and {first} in front",
    "a recording of {first} while {second_clause}",
    "{first_clause} with {second} far away",
    "we hear {first} over {second}",
)
_MIXTURE_HELD_OUT: Final = (
    "in the background {second_clause} while {first_clause} in front",
    "we hear {first} with {second} in the distance",
    "a recording of {first} in front of {second}",
    "the sound of {first} over {second} in the background",
    "{first_clause} and {second_clause} far away",
    "{first}, with {second} behind",
)
_CAPITAL_SHARE: Final = 0.4
_FULL_STOP_SHARE: Final = 0.2


@dataclass(frozen=True)
class Phrase:
    """The parts of a caption about one sound."""

    thing: str  # "a high-pitched beep"
    does: str  # "repeats"
    doing: str  # "repeating"
    tail: str  # " at a fast pace", or nothing


def _any(choices: Sequence[str], generator: np.random.Generator) -> str:
    return choices[int(generator.integers(len(choices)))]


def _with_article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _phrase(kind: str, attributes: Sequence[str], generator: np.random.Generator, held_out: bool) -> Phrase:
    """A name with its adjectives and a verb that agrees with it."""
    check_names(kind, attributes)
    words = _WORDS[kind]
    names = words.one + words.many + words.mass
    number = int(generator.integers(len(names)))
    chosen = []
    for value in attributes:
        # One in four pairs of a name and a synonym is kept back.
        allowed = [word for i, word in enumerate(_SYNONYMS[value]) if ((number + i) % 4 == 3) == held_out]
        chosen.append(_any(allowed, generator))
    if generator.uniform() < 0.5:
        chosen.reverse()
    bare = " ".join([*(word for word in chosen if word[0] != " "), names[number]])
    tail = " and".join(word for word in chosen if word[0] == " ")
    # Not "a beating heart beats": a verb that shares its stem with the name is passed over.
    verbs = [verb for verb in words.verbs if not any(part[:4] == verb[2][:4] for part in names[number].split())]
    singular, plural, doing = verbs[int(generator.integers(len(verbs)))]
    is_one, is_many = number < len(words.one), len(words.one) <= number < len(words.one) + len(words.many)
    return Phrase(_with_article(bare) if is_one else bare, plural if is_many else singular, doing, tail)


def _finish(text: str, generator: np.random.Generator) -> str:
    """Varies the capital and the full stop, as people do."""
    if generator.uniform() < _CAPITAL_SHARE:
        text = text[0].upper() + text[1:]
    return text + "." if generator.uniform() < _FULL_STOP_SHARE else text


def caption(kind: str, attributes: Sequence[str], generator: np.random.Generator, held_out: bool = False) -> str:
    """One of the many captions of a sound; with `held_out`, one that training captions never use."""
    phrase = _phrase(kind, attributes, generator, held_out)
    template = _any(_HELD_OUT if held_out else _TRAINING, generator)
    text = template.format(thing=phrase.thing, does=phrase.does, doing=phrase.doing, tail=phrase.tail)
    return _finish(text, generator)


def mixture_caption(
    first: tuple[str, Sequence[str]],
    second: tuple[str, Sequence[str]],
    generator: np.random.Generator,
    held_out: bool = False,
) -> str:
    """A caption of two sounds at once, each a kind and its attributes; `second` is the one in the background."""
    front, behind = (_phrase(kind, attributes, generator, held_out) for kind, attributes in (first, second))
    template = _any(_MIXTURE_HELD_OUT if held_out else _MIXTURE_TRAINING, generator)
    text = template.format(
        first=front.thing + front.tail,
        first_clause=f"{front.thing} {front.does}{front.tail}",
        second=behind.thing + behind.tail,
        second_clause=f"{behind.thing} {behind.does}{behind.tail}",
    )
    return _finish(text, generator)
