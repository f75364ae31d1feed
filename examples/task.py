"""The data: is a word, phrase or emoticon positive or negative? And is that sentiment strong?

Texts and ratings are vaderSentiment's lexicon (Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for
Sentiment Analysis of Social Media Text"): about 7,500 entries, each rated by ten people from -4 to 4. The label is the
sign of the mean rating. Every entry with a sign is used, those on which the raters were not of one mind too. The second
task asks of the same entries whether the mean is far from zero, whatever its sign.

Most entries have relatives (love, loved, lovely, lovingly), and who has learned one knows the others. So all words that
begin with the same three letters stay in one split: what is held out is new, not a new ending.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

CLASSES = ("negative", "positive")
# Of the mean rating without its sign, the median over the entries: what is above it is strong.
STRONG_ABOVE = 1.6
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}

_BEGINNING = 3
# A smiley is the same one with a nose or without, and lying on either side.
_FACES = str.maketrans("([{</", ")]}>\\", "-^'o")


@dataclass(frozen=True)
class Example:
    """A text, in lower case as the model sees it, the index of its class, and whether its sentiment is strong."""

    text: str
    label: int
    strong: int


@dataclass(frozen=True)
class Task:
    """Three splits that share no family."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def load_task() -> Task:
    """Read the installed lexicon and split it; every call gives the same splits in the same order."""
    return split(read_lexicon(lexicon_path()))


def first(data: Task, share: float) -> Task:
    """The first part of each split; they are in the order of a hash, so this is a draw."""
    return Task(*(part[: int(share * len(part))] for part in (data.train, data.validation, data.test)))


def lexicon_path() -> Path:
    """Find the lexicon without importing the package around it.

    Raises:
        FileNotFoundError: vaderSentiment is not installed.
    """
    found = importlib.util.find_spec("vaderSentiment")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("the data are in the package vaderSentiment (requirements/dev.txt), not installed here")
    return Path(found.submodule_search_locations[0]) / "vader_lexicon.txt"


def read_lexicon(path: Path) -> list[Example]:
    """Read lines of text, mean, deviation and ratings, and label each text."""
    ratings: defaultdict[str, list[int]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        text, _, _, numbers = line.split("\t")
        # The tokenizer knows no capitals: :D and :d are one text to the model, with the ratings of both.
        ratings[text.lower()] += [int(number) for number in numbers.strip("[]").split(",")]
    means = {text: sum(given) / len(given) for text, given in ratings.items()}
    return [Example(text, int(mean > 0), int(abs(mean) > STRONG_ABOVE)) for text, mean in means.items() if mean != 0]


def family(text: str) -> str:
    """Name what must stay together: words by their beginning, emoticons and the like by their characters."""
    beginning = text[:_BEGINNING]
    if len(beginning) == _BEGINNING and beginning.isalpha():
        return beginning
    return "".join(sorted(set(text.translate(_FACES))))


def split(examples: list[Example]) -> Task:
    """Deal whole families to the splits, so that each gets its share of every class."""
    families: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        families[family(example.text)].append(example)
    totals = Counter(example.label for example in examples)
    wanted = {name: {label: share * totals[label] for label in totals} for name, share in SHARES.items()}
    dealt: dict[str, list[Example]] = {name: [] for name in SHARES}
    # Large families first, while there is room for them; a hash's order is nobody's choice and the same everywhere.
    for name in sorted(families, key=lambda name: (-len(families[name]), _digest(name))):
        members = families[name]
        emptiest = max(SHARES, key=lambda part: sum(wanted[part][m.label] / SHARES[part] for m in members))
        dealt[emptiest] += members
        for member in members:
            wanted[emptiest][member.label] -= 1
    return Task(*(tuple(sorted(dealt[part], key=lambda example: _digest(example.text))) for part in SHARES))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
