"""The skills' questions: what the Open LLM Leaderboard asks for, in miniature, character by character.

| task | stands for | a question and its answer (the full stop is the end token) |
|---|---|---|
| instruction | IFEval: keep exactly to a format | ``say:gab,3-=gab-gab-gab.`` |
| reasoning | BBH: several symbolic steps | ``sort:hdmacb=abcdhm.`` |
| arithmetic | MATH: here, carrying | ``add:47+38=85.`` |
| choice | GPQA: pick the right one among look-alikes | ``pick:vok?a:red b:tan c:sky=b.`` |
| story | MuSR: follow who has what | ``who:a3b1c2,b5,a1?b=5.`` |
| recall | MMLU-Pro: know many things | ``of:vok size=big.`` |
| domain | an invented field, for continued pre-training | ``zor;eats=flim.`` |

Every question has a *key*; its hash says which split it belongs to, so the splits cannot overlap. For skills the key is the
question's content whatever its order (the letters that are to be sorted, the numbers that are to be added). A fact has eight
forms in which it can be asked for, and each split has some of them: it is learned in four and asked for in the test split in
two others.

The base learns the *easy* level of every skill and the facts of *its* things; an expert the *hard* level and further facts.
The levels overlap, so that the base answers a third to a half of the hard questions by construction (three repetitions, six
letters, units that add up to 12 at most, one gift, the things that it knows): its experts sharpen what is there, as fine-tunes
do.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from geomerge.lab.kinds import Split
from geomerge.lab.training import seed_for

Level = Literal["easy", "hard"]

_PATIENCE = 5000
"""Draws without a new question after which there are taken to be no more."""

SHARES: dict[Split, range] = {
    "train": range(11),
    "calibration": range(11, 12),
    "validation": range(12, 13),
    "test": range(13, 16),
}
"""Which sixteenths of all keys a split has."""

LETTERS = "abcdefghijklmnop"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
COLOURS = ("red", "tan", "sky", "jet", "ash", "fir", "ice", "ink")
SIZES = ("big", "low", "fat", "wee", "mid", "top")
PLACES = ("sea", "bog", "den", "sky", "ice", "oak", "pit", "fen")
EATS = ("flim", "gorn", "plet", "drus", "snib", "quam")
SAYS = ("hoo", "yip", "mrr", "kek", "bzz", "uff")

FORMS = (
    "of:{x} {r}=",
    "{x}:{r}=",
    "{r} of {x}=",
    "tell {x} {r}=",
    "{x} has {r}=",
    "{r},{x}=",
    "what {r}? {x}=",
    "{x};{r}=",
)
"""How a fact can be asked for."""


@dataclass(frozen=True)
class Question:
    """A prompt, its answer, and what decides its split."""

    prompt: str
    answer: str
    key: str | Split


@dataclass(frozen=True)
class World:
    """The things of one seed and what is true of them.

    Attributes:
        known: Things whose facts the base learns.
        other: Things whose facts only an expert learns, by task.
        facts: (thing, relation) → value.
    """

    known: tuple[str, ...]
    other: dict[str, tuple[str, ...]]
    facts: dict[tuple[str, str], str]

    def asked(self, task: str, known: int) -> tuple[str, ...]:
        """The things that an expert is asked about: its own, and some that the base knows."""
        return (*self.other[task], *self.known[:known])


RELATIONS = {"hue": COLOURS, "size": SIZES, "home": PLACES, "eats": EATS, "says": SAYS}


@functools.cache
def make_world(seed: int) -> World:
    """Things with names of three letters, and their facts."""
    draw = random.Random(seed_for(seed, "skills/world"))
    names = [a + v + b for a in CONSONANTS for v in VOWELS for b in CONSONANTS if a != b]
    draw.shuffle(names)
    groups = {"recall": tuple(names[:40]), "choice": tuple(names[40:56]), "domain": tuple(names[56:80])}
    known = tuple(names[80:104])
    facts = {(x, r): draw.choice(values) for x in sorted(names[:104]) for r, values in RELATIONS.items()}
    return World(known, groups, facts)


def split_of(key: str | Split) -> Split:
    """The split that a key belongs to; a key may be a split's name."""
    if key in SHARES:
        return key
    sixteenth = zlib.crc32(key.encode()) % 16
    return next(split for split, share in SHARES.items() if sixteenth in share)


def instruction(draw: random.Random, level: Level, _: World) -> Question:
    word = draw.choice(CONSONANTS) + draw.choice(VOWELS) + draw.choice(CONSONANTS)
    times = draw.choice((1, 2, 3) if level == "easy" else (3, 4))
    mark = draw.choice("-+/;")
    return Question(f"say:{word},{times}{mark}=", mark.join([word] * times), f"say {word}")


def reasoning(draw: random.Random, level: Level, _: World) -> Question:
    given = draw.sample(LETTERS, draw.choice((3, 4, 5, 6) if level == "easy" else (6, 7, 8)))
    answer = "".join(sorted(given))
    return Question(f"sort:{''.join(given)}=", answer, f"sort {answer}")


def arithmetic(draw: random.Random, level: Level, _: World) -> Question:
    while True:
        a, b = draw.randrange(10, 100), draw.randrange(10, 100)
        units = a % 10 + b % 10
        if (units <= 12) if level == "easy" else (units > 9):
            return Question(f"add:{a}+{b}=", f"{a + b}", f"add {min(a, b)} {max(a, b)}")


def choice(draw: random.Random, level: Level, world: World) -> Question:
    things = world.known if level == "easy" else world.asked("choice", 8)
    thing = draw.choice(things)
    right = world.facts[thing, "hue"]
    options = [right, *draw.sample([c for c in COLOURS if c != right], 2)]
    draw.shuffle(options)
    said = " ".join(f"{mark}:{option}" for mark, option in zip("abc", options, strict=True))
    key = f"pick {thing} {' '.join(options)}"
    return Question(f"pick:{thing}?{said}=", "abc"[options.index(right)], key)


def story(draw: random.Random, level: Level, _: World) -> Question:
    held = dict(zip("abc", draw.sample("123456", 3), strict=True))
    told = ["".join(f"{who}{what}" for who, what in held.items())]
    for _gift in range(draw.choice((0, 1) if level == "easy" else (1, 2))):
        who, what = draw.choice("abc"), draw.choice("123456")
        held[who] = what
        told.append(who + what)
    asked = draw.choice("abc")
    return Question(f"who:{','.join(told)}?{asked}=", held[asked], f"who {told}")


def recall(draw: random.Random, level: Level, world: World) -> Question:
    things = world.known if level == "easy" else world.asked("recall", 20)
    return _fact(draw, things, ("hue", "size", "home"), world)


def domain(draw: random.Random, level: Level, world: World) -> Question:
    things = world.known if level == "easy" else world.asked("domain", 8)
    return _fact(draw, things, ("eats", "says"), world)


def _fact(draw: random.Random, things: tuple[str, ...], relations: tuple[str, ...], world: World) -> Question:
    thing, relation, form = draw.choice(things), draw.choice(relations), draw.randrange(len(FORMS))
    order = sorted(range(len(FORMS)), key=lambda f: seed_for(f, f"{thing} {relation}"))
    splits: tuple[Split, ...] = ("train", "train", "train", "train", "calibration", "validation", "test", "test")
    asked = FORMS[form].format(x=thing, r=relation)
    return Question(asked, world.facts[thing, relation], splits[order.index(form)])


Generator = Callable[[random.Random, Level, World], Question]

GENERATORS: dict[str, Generator] = {
    "instruction": instruction,
    "reasoning": reasoning,
    "arithmetic": arithmetic,
    "choice": choice,
    "story": story,
    "recall": recall,
    "domain": domain,
}

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;?=+-/[]"
"""Every character that a question, an answer or the chat template has."""


@functools.cache
def questions(task: str, level: Level, seed: int, split: Split, count: int) -> tuple[Question, ...]:
    """Up to `count` different questions of a split, always the same ones for a seed; fewer when there are no more.

    Args:
        task: A key of `GENERATORS`.
        level: The base's or the experts'.
        seed: The suite's.
        split: Which part.
        count: How many.
    """
    world = make_world(seed)
    draw = random.Random(seed_for(seed, f"skills/{task}/{level}/{split}"))
    found: dict[str, Question] = {}
    fruitless = 0
    while len(found) < count and fruitless < _PATIENCE:
        question = GENERATORS[task](draw, level, world)
        fruitless += 1
        if split_of(question.key) == split and question.prompt not in found:
            found[question.prompt] = question
            fruitless = 0
    return tuple(found.values())
