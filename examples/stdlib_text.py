"""English that every machine with Python has: the language reference and the standard library's docstrings.

Read at run time from the installed Python, nothing is copied. `python examples/stdlib_text.py FOLDER` writes
`train.txt` and `heldout.txt`: one paragraph a line, an empty line between documents.
"""

import ast
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

HELDOUT_EVERY = 10
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


def topics() -> Iterator[str]:
    """The topics of `help()`: the language reference."""
    from pydoc_data.topics import topics as texts

    for name in sorted(texts):
        yield texts[name]


def docstrings() -> Iterator[str]:
    """One text for each module of the standard library: its docstrings, read without importing it."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(stdlib).parts):
            continue
        tree = ast.parse(path.read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        yield "\n\n".join(text for text in found if text)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text that are prose, one line each."""
    for block in inspect.cleandoc(text).split("\n\n"):
        words = block.split()
        letters = sum(character.isalpha() or character.isspace() for character in block)
        if len(words) >= 5 and letters >= 0.8 * len(block) and ">>>" not in block and "::=" not in block:
            yield " ".join(words)


def documents() -> Iterator[list[str]]:
    """Documents as lists of paragraphs. A paragraph comes once: the topics repeat each other, and a repeated one would
    stand in the training text and in the held-out text."""
    seen: set[str] = set()
    for text in chain(topics(), docstrings()):
        new = [paragraph for paragraph in dict.fromkeys(paragraphs(text)) if paragraph not in seen]
        seen.update(new)
        if new:
            yield new


def write_text(folder: Path) -> tuple[Path, Path]:
    """Write `train.txt` and `heldout.txt` (every tenth document) into the folder and return their paths."""
    train: list[str] = []
    heldout: list[str] = []
    for number, document in enumerate(documents()):
        (train if number % HELDOUT_EVERY else heldout).append("\n".join(document))
    paths = folder / "train.txt", folder / "heldout.txt"
    folder.mkdir(parents=True, exist_ok=True)
    for path, texts in zip(paths, (train, heldout), strict=True):
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return paths


if __name__ == "__main__":
    for written in write_text(Path(sys.argv[1])):
        print(written)
