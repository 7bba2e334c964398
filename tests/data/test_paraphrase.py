"""Documents of passages and paraphrases, their controls, and how they are mixed with text."""

import lzma
from pathlib import Path

import pytest

from mabert.data.paraphrase import KINDS, ORDERS, Augmentation, read_pairs
from mabert.data.tables import TableError

PAIRS = [(f"passage {n} a b", f"rewording {n} c") for n in range(20)]


def number(text: str) -> str:
    return text.split()[1]


@pytest.mark.parametrize("order", ["passage-first", "paraphrase-first"])
def test_a_document_is_a_passage_a_gap_and_its_paraphrase(order: str) -> None:
    made = list(Augmentation(order=order, gap=(2, 5)).documents(PAIRS))
    assert len(made) == len(PAIRS)
    seen = set()
    for document in made:
        for passage, paraphrase in PAIRS:
            first, second = (passage, paraphrase) if order == "passage-first" else (paraphrase, passage)
            if document.startswith(f"{first} ") and document.endswith(f" {second}"):
                gap = document[len(first) : -len(second)].split()
                assert 2 <= len(gap) <= 5
                seen.add(passage)
    assert len(seen) == len(PAIRS)


def test_either_order_comes() -> None:
    made = list(Augmentation(order="either", gap=(0, 0)).documents(PAIRS))
    firsts = {document.split()[0] for document in made}
    assert firsts == {"passage", "rewording"}


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_controls_keep_everything_but_the_paraphrase(order: str, turn: int) -> None:
    def made(kind: str) -> list[str]:
        return list(Augmentation(kind=kind, order=order, gap=(2, 5)).documents(PAIRS, turn))

    def joined(passage: str, gap: str, other: str) -> str:
        return f"{other} {gap} {passage}" if is_swapped else f"{passage} {gap} {other}"

    paraphrased, verbatim, unrelated, apart = map(made, ("paraphrase", "verbatim", "unrelated", "apart"))
    assert len(paraphrased) == len(PAIRS)
    assert [" ".join(two) for two in zip(apart[::2], apart[1::2], strict=True)] == paraphrased
    others = []
    for index, document in enumerate(paraphrased):
        is_swapped = document.startswith("rewording")
        passage, paraphrase = PAIRS[int(number(document))]
        gap = " ".join(document.split()[3:-4] if is_swapped else document.split()[4:-3])
        assert number(document) not in gap.split(), "it is of other passages"
        assert document == joined(passage, gap, paraphrase)
        assert verbatim[index] == joined(passage, gap, passage)
        assert apart[2 * index] == (paraphrase if is_swapped else passage)
        others += [other for other, _ in PAIRS if unrelated[index] == joined(passage, gap, other) and other != passage]
    assert len(others) == len(PAIRS)


def test_seeds_give_other_documents_and_the_same_seed_the_same() -> None:
    one, again, other = (list(Augmentation(seed=seed).documents(PAIRS)) for seed in (0, 0, 1))
    assert one == again
    assert one != other


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 1.0])
def test_the_ratio_is_that_of_the_words(ratio: float) -> None:
    text = [f"text {n} " + "word " * 10 for n in range(1_000)]
    mixed = Augmentation(ratio=ratio, gap=(0, 0)).mixed(PAIRS, text, 4_000)
    words = sum(len(document.split()) for document in mixed)
    made = sum(len(document.split()) for document in mixed if not document.startswith("text"))
    assert words == pytest.approx(4_000, rel=0.02)
    assert made == pytest.approx(4_000 * ratio, rel=0.02)
    assert mixed != sorted(mixed)


def test_without_documents_of_pairs_there_is_text_alone_from_anywhere() -> None:
    text = [f"text {n}" for n in range(100)]
    mixed = Augmentation(kind="none").mixed(PAIRS, text, 100)
    assert len(set(mixed)) == 50
    assert set(mixed) < set(text)
    assert len(set(mixed) & set(text[50:])) > 10
    assert set(mixed) != set(Augmentation(kind="none", seed=1).mixed(PAIRS, text, 100))


def test_with_one_seed_every_kind_has_the_same_text() -> None:
    text = [f"text {n}" for n in range(1_000)]
    made = {
        kind: {document for document in Augmentation(kind=kind).mixed(PAIRS, text, 1_000) if document in text}
        for kind in KINDS
    }
    assert made.pop("none") > made["paraphrase"]
    assert len(set(map(frozenset, made.values()))) == 1


def test_pairs_that_come_again_have_other_gaps_and_another_order() -> None:
    augmentation = Augmentation(gap=(3, 9), ratio=1.0)
    first, second = (list(augmentation.documents(PAIRS, turn)) for turn in (0, 1))
    assert first == list(augmentation.documents(PAIRS))
    assert not set(first) & set(second)
    assert [number(document) for document in first] != [number(document) for document in second]
    words = sum(len(document.split()) for document in first + second)
    assert sorted(augmentation.mixed(PAIRS, [], words)) == sorted(first + second)


def test_too_little_text_is_said() -> None:
    with pytest.raises(ValueError, match=r"too few words for 1,000, of which 75% are unmodified text"):
        Augmentation().mixed(PAIRS, ["a b"], 1_000)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"kind": "copy"}, f"kind='copy' is not one of {', '.join(KINDS)}"),
        ({"order": "first"}, "order='first' is not one of"),
        ({"ratio": 0.0}, "ratio=0.0 must be above 0"),
        ({"ratio": 1.5}, "ratio=1.5 must be above 0"),
        ({"gap": (3, 1)}, r"gap=\(3, 1\) must be two numbers"),
        ({"gap": (-1, 1)}, r"gap=\(-1, 1\) must be two numbers"),
        ({"gap": 5}, "gap=5 must be two numbers"),
        ({"gap": (0, 1, 2)}, r"gap=\(0, 1, 2\) must be two numbers"),
        ({"gap": (0.5, 1)}, r"gap=\(0.5, 1\) must be two numbers"),
    ],
)
def test_bad_choices_are_refused(choices: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**choices)


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 pairs are too few"):
        list(Augmentation().documents(PAIRS[:2]))


def test_sentences_are_read_by_their_names_behind_an_id(tmp_path: Path) -> None:
    path = tmp_path / "paws.tsv"
    path.write_text("id\tsentence2\tlabel\tsentence1\n7\tB a .\t1\tA b .\n8\tD .\t0\tC .\n", encoding="utf-8")
    assert read_pairs([path]) == [("A b .", "B a .")]
    path.write_text("id\tpassage\tparaphrase\n7\tA b .\tB a .\n", encoding="utf-8")
    assert read_pairs([path]) == [("A b .", "B a .")]


def test_pairs_are_read_from_the_first_two_columns(tmp_path: Path) -> None:
    plain = tmp_path / "a.tsv"
    plain.write_text("one\ttwo\nA  b .\tB a .\n", encoding="utf-8")
    labelled = tmp_path / "b.tsv"
    labelled.write_text("sentence1\tsentence2\tlabel\nC .\tD .\t1\nE .\tF .\t0\n", encoding="utf-8")
    packed = tmp_path / "c.tsv.xz"
    packed.write_bytes(lzma.compress(b"complex\tsplit\nG h .\tG . <::::> H .\n"))
    assert read_pairs([plain, labelled, packed]) == [("A b .", "B a ."), ("C .", "D ."), ("G h .", "G . H .")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("only\nA\n", r"line 1: two columns of text are needed"),
        ("passage\tlabel\nA\t1\n", r"line 1: two columns of text are needed, .* not passage, label"),
        ("id\ttext\tother\n1\tA\tB\n", r"line 1: two columns of text are needed, .* not id, text, other"),
        ("same\tsame\nA\tB\n", r"line 1: two columns of text are needed"),
        ("one\ttwo\nA\tB\nC\t  \n", "row 2: a text is empty"),
        ("one\ttwo\nA\n", "line 2"),
        ("one\ttwo\tlabel\nA\tB\t0\n", "no pair .*: of the labels 0 only 1 says that there is one"),
        ("one\ttwo\tlabel\nA\tB\ttrue\n", "of the labels true only 1"),
    ],
)
def test_files_without_pairs_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TableError, match=message) as refused:
        read_pairs([path])
    assert "pairs.tsv" in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="does not exist"):
        read_pairs([tmp_path / "none.tsv"])
