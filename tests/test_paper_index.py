"""docs/paper.md lists every equation and choice where it really stands."""

from pathlib import Path

import pytest

import paper_index
from paper_index import Comment, all_comments, comments_in, numbers_in, renewed


def comments_of(tmp_path: Path, source: str) -> list[Comment]:
    path = tmp_path / "src" / "module.py"
    path.parent.mkdir()
    path.write_text(source, encoding="utf-8")
    return list(comments_in(path, tmp_path))


def test_page_is_up_to_date() -> None:
    page = paper_index.PAGE.read_text(encoding="utf-8")
    assert renewed(page, all_comments()) == page, "docs/paper.md is out of date: run `make paper`"


@pytest.mark.parametrize(
    ("system", "equations"), [("MaBERT", set(range(1, 15))), ("TransMamba", {1, 2, 3, 4, 5, 6, 9, 10})]
)
def test_every_equation_stands_in_the_code(system: str, equations: set[int]) -> None:
    cited = {number for comment in all_comments() if comment.system == system for number in comment.equations}
    assert cited >= equations, f"no comment cites Eq. {sorted(equations - cited)} of {system}"


def test_choices_give_their_reason() -> None:
    bare = [f"{c.path}:{c.line}" for c in all_comments() if c.kind == "CHOICE" and len(c.text.split()) < 3]
    assert not bare, f"a choice says why: {bare}"


def test_comments_are_read_with_their_place(tmp_path: Path) -> None:
    source = (
        'x = "# CHOICE: a string"\ny = 1  # PAPER Eq. 2: mask | LN\n# CHOICE: because of BERT\n# PAPER: 12 layers\n'
        "# PAPER TransMamba Eqs. 3 and 4: a scan\n# PAPER TransMamba: 24 layers\n"
    )
    assert comments_of(tmp_path, source) == [
        Comment("src/module.py", 2, "PAPER", "MaBERT", (2,), "mask | LN"),
        Comment("src/module.py", 3, "CHOICE", "MaBERT", (), "because of BERT"),
        Comment("src/module.py", 4, "PAPER", "MaBERT", (), "12 layers"),
        Comment("src/module.py", 5, "PAPER", "TransMamba", (3, 4), "a scan"),
        Comment("src/module.py", 6, "PAPER", "TransMamba", (), "24 layers"),
    ]


def test_a_comment_goes_on_in_the_comment_lines_below_it(tmp_path: Path) -> None:
    source = "# CHOICE: because it\n# is so\n# PAPER Eq. 1: a\nx = 1  # CHOICE: one line only\n       # not this\n"
    assert [c.text for c in comments_of(tmp_path, source)] == ["because it is so", "a", "one line only"]


@pytest.mark.parametrize(
    ("text", "numbers"), [("2", (2,)), ("2, 3", (2, 3)), ("2 and 10", (2, 10)), ("4-6", (4, 5, 6)), ("4–5", (4, 5))]
)
def test_equation_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert numbers_in(text) == numbers


@pytest.mark.parametrize(
    "comment", ["# PAPER equation 3", "# CHOICE because", "# PAPER Eq. x", "# PAPER Other Eq. 3: x"]
)
def test_a_mark_that_cannot_be_read_names_its_line(tmp_path: Path, comment: str) -> None:
    with pytest.raises(ValueError, match=r"src/module\.py:2: write"):
        comments_of(tmp_path, f"x = 1\n{comment}\n")


def test_a_moved_equation_changes_the_page() -> None:
    page = f"before\n{paper_index.BEGIN}\n{paper_index.END}\nafter\n"
    first, moved = (renewed(page, [Comment("src/a.py", line, "PAPER", "MaBERT", (1,), "T | layer")]) for line in (3, 4))
    assert first != moved
    assert first.startswith("before\n")
    assert first.endswith("\nafter\n")
    assert "| 1 | [src/a.py:3](../src/a.py#L3) |" in first
    assert "T \\| layer" in first
    assert renewed(first, []) == renewed(page, [])


def test_a_page_without_markers_raises() -> None:
    with pytest.raises(ValueError, match="needs the two lines"):
        renewed("no markers", [])
