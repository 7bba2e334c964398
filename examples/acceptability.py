"""A small acceptability task: generated English sentences, half of them broken, in words of Python's documentation.

A sentence is broken in one of three ways: its verb disagrees with its subject, a determiner disagrees with its noun, or
two neighbouring words are exchanged. Train and test share no sentence, and no test sentence is a broken train sentence.
`python examples/acceptability.py FOLDER` writes `train.tsv` and `test.tsv` with the columns `sentence` and `label`.
"""

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

SINGULAR, PLURAL = 0, 1
NOUNS = (
    "function functions|method methods|object objects|class classes|module modules|value values|argument arguments"
    "|string strings|file files|list lists|exception exceptions|name names|line lines|type types|attribute attributes"
    "|instance instances|package packages|key keys|sequence sequences|element elements|thread threads|item items"
)
VERBS = (
    "returns return|raises raise|contains contain|reads read|takes take|calls call|creates create|uses use"
    "|changes change|provides provide|supports support|defines define|accepts accept|needs need|represents represent"
)
DETERMINERS = (("a", "this", "each", "every"), ("these", "those", "several", "many", "two"))
ADJECTIVES = ("new", "empty", "given", "default", "local", "optional", "simple", "special", "standard")
STATES = ("empty", "optional", "local", "new")
PREPOSITIONS = ("of", "in", "for")


@dataclass(frozen=True)
class Word:
    """A word of a sentence; `mismatches` are the forms that agree with the other number."""

    text: str
    kind: str = ""
    mismatches: tuple[str, ...] = ()


def pairs(table: str) -> list[tuple[str, str]]:
    """`"returns return|…"` as pairs of a singular and a plural form."""
    return [(singular, plural) for singular, plural in (entry.split() for entry in table.split("|"))]


def finite(forms: tuple[str, str], number: int) -> Word:
    """A finite verb that agrees with the number."""
    return Word(forms[number], "verb", (forms[1 - number],))


def noun_phrase(rng: random.Random, number: int) -> list[Word]:
    """A determiner, sometimes an adjective, and a noun of the given number."""
    noun = rng.choice(pairs(NOUNS))[number]
    following = [rng.choice(ADJECTIVES), noun] if rng.random() < 0.4 else [noun]

    def fits(determiner: str) -> str:
        return "an" if determiner == "a" and following[0][0] in "aeiou" else determiner

    if rng.random() < 0.3:
        determiner = Word("the")
    else:
        mismatches = tuple(fits(other) for other in DETERMINERS[1 - number])
        determiner = Word(fits(rng.choice(DETERMINERS[number])), "determiner", mismatches)
    return [determiner, *map(Word, following)]


def sentence(rng: random.Random) -> list[Word]:
    """An acceptable sentence. Between subject and verb there may stand a noun of another number."""
    number = rng.choice((SINGULAR, PLURAL))
    words = noun_phrase(rng, number)
    if rng.random() < 0.4:
        words += [Word(rng.choice(PREPOSITIONS)), *noun_phrase(rng, rng.choice((SINGULAR, PLURAL)))]
    main = rng.choice(pairs(VERBS))
    kind = rng.choices(("state", "negated", "plain"), (0.2, 0.2, 0.6))[0]
    if kind == "state":
        return [*words, finite(("is", "are"), number), Word(rng.choice(STATES))]
    if kind == "negated":
        words += [finite(("does", "do"), number), Word("not"), Word(main[PLURAL])]
    else:
        words.append(finite(main, number))
    return [*words, *noun_phrase(rng, rng.choice((SINGULAR, PLURAL)))]


def broken(rng: random.Random, words: list[Word]) -> list[Word]:
    """The sentence with one fault."""
    fault = rng.choice(("verb", "determiner", "order"))
    places = [place for place, word in enumerate(words) if word.kind == fault]
    if places:
        place = rng.choice(places)
        wrong = replace(words[place], text=rng.choice(words[place].mismatches))
        return [*words[:place], wrong, *words[place + 1 :]]
    place = rng.randrange(len(words) - 1)
    return [*words[:place], words[place + 1], words[place], *words[place + 2 :]]


def text_of(words: list[Word]) -> str:
    """The sentence as it is written."""
    return " ".join(word.text for word in words).capitalize() + "."


def examples(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` distinct pairs of sentence and label, labels in turn; no two come from the same acceptable sentence."""
    rng = random.Random(seed)
    sources: set[str] = set()
    found: dict[str, str] = {}
    while len(found) < count:
        words = sentence(rng)
        label = ("acceptable", "unacceptable")[len(found) % 2]
        text = text_of(words if label == "acceptable" else broken(rng, words))
        if text_of(words) not in sources and text not in found:
            sources.add(text_of(words))
            found[text] = label
    return list(found.items())


def write_tables(folder: Path, train: int = 8000, test: int = 500) -> tuple[Path, Path]:
    """Write `train.tsv` and `test.tsv` into the folder and return their paths."""
    rows = examples(train + test)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.tsv", folder / "test.tsv"
    for path, part in zip(paths, (rows[:train], rows[train:]), strict=True):
        lines = ["sentence\tlabel", *("\t".join(row) for row in part)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


if __name__ == "__main__":
    for written in write_tables(Path(sys.argv[1])):
        print(written)
