"""An acceptability task and a text in the same language, generated: simple English in words of Python's documentation.

Half of the task's sentences are broken, in one of three ways: the verb disagrees with its subject, a determiner
disagrees with its noun, or two neighbouring words are exchanged. All sentences of the text are acceptable. None of them
is one of the task's, or one of which the task has the broken form: having read a sentence would tell its label.
"""

import random
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mabert.files import atomic_write

SINGULAR, PLURAL = 0, 1
LABELS = ("acceptable", "unacceptable")
TRAIN_ROWS, DEV_ROWS = 8000, 500


def pairs(table: str) -> list[tuple[str, str]]:
    """`"returns return|…"` as pairs of a singular and a plural form."""
    return [(singular, plural) for singular, plural in (entry.split() for entry in table.split("|"))]


NOUNS = pairs(
    "function functions|method methods|object objects|class classes|module modules|value values|argument arguments"
    "|string strings|file files|list lists|exception exceptions|name names|line lines|type types|attribute attributes"
    "|instance instances|package packages|key keys|sequence sequences|element elements|thread threads|item items"
)
VERBS = pairs(
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


@dataclass(frozen=True)
class Cast:
    """The nouns and verbs that sentences are made of."""

    nouns: Sequence[tuple[str, str]] = tuple(NOUNS)
    verbs: Sequence[tuple[str, str]] = tuple(VERBS)

    @classmethod
    def of_a_document(cls, rng: random.Random) -> "Cast":
        """The few that one document keeps speaking of."""
        return cls(rng.sample(NOUNS, 3), rng.sample(VERBS, 2))

    def sentence(self, rng: random.Random) -> list[Word]:
        """An acceptable sentence. Between subject and verb there may stand a noun of another number."""
        number = rng.choice((SINGULAR, PLURAL))
        words = self._noun_phrase(rng, number)
        if rng.random() < 0.4:
            words += [Word(rng.choice(PREPOSITIONS)), *self._noun_phrase(rng, rng.choice((SINGULAR, PLURAL)))]
        main = rng.choice(self.verbs)
        kind = rng.choices(("state", "negated", "plain"), (0.2, 0.2, 0.6))[0]
        if kind == "state":
            return [*words, _finite(("is", "are"), number), Word(rng.choice(STATES))]
        if kind == "negated":
            words += [_finite(("does", "do"), number), Word("not"), Word(main[PLURAL])]
        else:
            words.append(_finite(main, number))
        return [*words, *self._noun_phrase(rng, rng.choice((SINGULAR, PLURAL)))]

    def _noun_phrase(self, rng: random.Random, number: int) -> list[Word]:
        """A determiner, sometimes an adjective, and a noun of the given number."""
        noun = rng.choice(self.nouns)[number]
        following = [rng.choice(ADJECTIVES), noun] if rng.random() < 0.4 else [noun]

        def fits(determiner: str) -> str:
            return "an" if determiner == "a" and following[0][0] in "aeiou" else determiner

        if rng.random() < 0.3:
            determiner = Word("the")
        else:
            mismatches = tuple(fits(other) for other in DETERMINERS[1 - number])
            determiner = Word(fits(rng.choice(DETERMINERS[number])), "determiner", mismatches)
        return [determiner, *map(Word, following)]


def _finite(forms: tuple[str, str], number: int) -> Word:
    """A finite verb that agrees with the number."""
    return Word(forms[number], "verb", (forms[1 - number],))


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


def sentences(count: int, seed: int = 0) -> list[str]:
    """`count` distinct acceptable sentences; fewer of the same seed are the first among more."""
    rng, everything = random.Random(seed), Cast()
    found: dict[str, None] = {}
    while len(found) < count:
        found[text_of(everything.sentence(rng))] = None
    return list(found)


def paraphrases(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` distinct pairs of a passage of two sentences and the same in other words: what they speak of first comes
    last."""
    rng, everything = random.Random(seed), Cast()
    found: dict[str, str] = {}
    while len(found) < count:
        parts = [_subject_verb_object(rng, everything) for _ in range(2)]
        passage = " ".join(f"{subject} {verb} {complement}.".capitalize() for subject, verb, complement in parts)
        found[passage] = " ".join(f"It is {complement} that {subject} {verb}." for subject, verb, complement in parts)
    return list(found.items())


def _subject_verb_object(rng: random.Random, cast: Cast) -> tuple[str, str, str]:
    number = rng.choice((SINGULAR, PLURAL))
    subject, complement = (
        " ".join(word.text for word in cast._noun_phrase(rng, of)) for of in (number, rng.choice((SINGULAR, PLURAL)))
    )
    return subject, rng.choice(cast.verbs)[number], complement


def examples(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` distinct pairs of sentence and label, labels in turn; no two come from the same acceptable sentence."""
    return [(text, label) for _, text, label in _examples(count, seed)]


def _examples(count: int, seed: int) -> list[tuple[str, str, str]]:
    """The same, each behind the acceptable sentence that it comes from."""
    rng, everything = random.Random(seed), Cast()
    sources: set[str] = set()
    found: dict[str, tuple[str, str, str]] = {}
    while len(found) < count:
        words = everything.sentence(rng)
        label = LABELS[len(found) % 2]
        text = text_of(words if label == "acceptable" else broken(rng, words))
        if (source := text_of(words)) not in sources and text not in found:
            sources.add(source)
            found[text] = source, text, label
    return list(found.values())


def write_tables(folder: Path, train: int = TRAIN_ROWS, dev: int = DEV_ROWS, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.tsv` and `dev.tsv`, columns `sentence` and `label`, into the folder and return their paths.

    They share no sentence, and no dev sentence is a broken train sentence.
    """
    rows = examples(train + dev, seed)
    parts = {"train.tsv": rows[:train], "dev.tsv": rows[train:]}
    return _write(folder, {name: "\n".join(["sentence\tlabel", *map("\t".join, part)]) for name, part in parts.items()})


def write_text(
    folder: Path, train: int = 4000, valid: int = 400, seed: int = 0, *, task_rows: int = TRAIN_ROWS + DEV_ROWS
) -> tuple[Path, Path]:
    """Write `train.txt` and `valid.txt`, so many documents each, into the folder and return their paths.

    A sentence stands in a line, an empty line parts documents. A document keeps to a few nouns and verbs, so that a
    masked word is easier to tell from the document than from its sentence alone. No sentence of valid is in train, and
    none of either belongs to the first `task_rows` rows of the task of the same seed, train and dev.
    """
    rng = random.Random(seed)
    taken = {source for source, _, _ in _examples(task_rows, seed)}
    held_out = [_document(rng, taken) for _ in range(valid)]
    taken.update(sentence for document in held_out for sentence in document)
    read = [_document(rng, taken) for _ in range(train)]
    parts = {"train.txt": read, "valid.txt": held_out}
    return _write(folder, {name: "\n\n".join(map("\n".join, part)) for name, part in parts.items()})


def _document(rng: random.Random, taken: Container[str]) -> list[str]:
    """5 to 20 distinct sentences of one cast, none of them among those taken."""
    cast, length = Cast.of_a_document(rng), rng.randint(5, 20)
    found: dict[str, None] = {}
    while len(found) < length:
        if (text := text_of(cast.sentence(rng))) not in taken:
            found[text] = None
    return list(found)


def _write(folder: Path, files: Mapping[str, str]) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with atomic_write(folder / name, "w") as file:
            file.write(f"{text}\n")
    first, second = (folder / name for name in files)
    return first, second
