"""The examples run, and the demo's text is fair: nothing of what is held out was trained on."""

import random
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import demo
import pretrain_on_own_text
import stdlib_text
import use_a_model
from mabert.data.generated import Cast
from mabert.training.callbacks import TrainingInterruptedError
from mabert_cli.app import app

EXAMPLES = Path(stdlib_text.__file__).parent


@pytest.fixture(scope="module")
def documents() -> list[list[str]]:
    return list(stdlib_text.documents())


def test_the_standard_library_gives_a_megabyte_of_prose_the_same_each_time(documents: list[list[str]]) -> None:
    assert sum(len(paragraph) for document in documents for paragraph in document) > 1_000_000
    assert documents[:20] == [document for document, _ in zip(stdlib_text.documents(), range(20), strict=False)]


def test_no_paragraph_comes_twice(documents: list[list[str]]) -> None:
    paragraphs = [paragraph for document in documents for paragraph in document]
    assert len(paragraphs) == len(set(paragraphs))


def test_every_tenth_document_is_held_out(
    tmp_path: Path, documents: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdlib_text, "documents", lambda: documents)
    train, heldout = (path.read_text(encoding="utf-8") for path in stdlib_text.write_text(tmp_path))
    assert heldout.rstrip("\n").split("\n\n") == ["\n".join(document) for document in documents[::10]]
    assert len(train.split("\n\n")) + len(heldout.split("\n\n")) == len(documents)
    assert not set(train.splitlines()) & set(heldout.splitlines()) - {""}


def test_what_is_no_prose_is_left_out() -> None:
    text = "A sentence of more words.\n\n>>> print('one two three four five')\n\na ::= b c d e f g\n\ntoo short\n"
    assert list(stdlib_text.paragraphs(text)) == ["A sentence of more words."]


def test_its_words_are_those_of_the_documentation(documents: list[list[str]]) -> None:
    known = set(" ".join(paragraph for document in documents for paragraph in document).lower().split())
    rng = random.Random(2)
    used = {word.text for _ in range(2000) for word in Cast().sentence(rng)}
    assert used <= known


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo may not set the threads of the tests that follow."""
    monkeypatch.setattr(demo.torch, "set_num_threads", lambda count: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A quick demo: its folder, what it printed and what it returned."""
    folder = tmp_path_factory.mktemp("demo")
    with demo.say.capture() as capture:
        code = demo.run(folder, quick=True)
    return SimpleNamespace(folder=folder, output=capture.get(), code=code)


def test_a_demo_that_learnt_nothing_says_so_and_fails(made: SimpleNamespace) -> None:
    assert made.code == 1
    assert "Failed: held-out loss" in made.output
    assert "majority class 0.5" in made.output


def test_the_commands_that_the_demo_prints_use_what_it_made(made: SimpleNamespace) -> None:
    printed = made.output.partition("Next")[2].splitlines()
    commands = [shlex.split(line) for line in printed if "mabert " in line and "Failed" not in line]
    assert [words[1] for words in commands] == ["fill-mask", "predict", "encode"]
    for program, *words in commands:
        assert Path(program).resolve() == Path(sys.executable).with_name("mabert").resolve()
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    assert len((made.folder / "labels.tsv").read_text(encoding="utf-8").splitlines()) == 501
    lines = (made.folder / "text" / "heldout.txt").read_text(encoding="utf-8").splitlines()
    assert np.load(made.folder / "vectors.npy").shape == (len(lines), 64)


def test_a_demo_that_is_run_again_keeps_what_is_there(made: SimpleNamespace) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in made.folder.rglob("*") if path.suffix in (".safetensors", ".tsv")
    }
    with demo.say.capture() as capture:
        demo.run(made.folder, quick=True)
    assert capture.get().count("is finished already") == 2
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_demo_asks_for_both_to_be_beaten() -> None:
    def found(loss: float, accuracy: float) -> int:
        split = SimpleNamespace(metrics={"accuracy": accuracy}, majority={"accuracy": 0.5})
        pretrained = SimpleNamespace(held_out_loss=loss, unigram_entropy=6.0)
        return len(demo.failures(pretrained, SimpleNamespace(splits={"dev": split})))  # type: ignore[arg-type]

    assert [found(5.9, 0.6), found(6.0, 0.6), found(5.9, 0.5), found(float("nan"), 0.4)] == [0, 1, 1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TrainingInterruptedError(2, 7, Path("checkpoint-7"))])
def test_a_stopped_demo_says_how_to_go_on(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(folder: Path, quick: bool) -> int:
        raise error

    monkeypatch.setattr(demo, "run", stopped)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert demo.main() == 130
    assert "Run it again to go on." in capsys.readouterr().out


def test_a_demo_over_another_ones_folder_says_how_to_start_over(
    made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--folder", str(made.folder)])  # without --quick: other choices
    assert demo.main() == 2
    output = " ".join(capsys.readouterr().out.split())
    assert "holds a run with other choices" in output
    assert f"Delete {made.folder} to start over." in output


def test_a_model_is_used_through_pipelines(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    use_a_model.main(str(made.folder / "pretrained"), str(made.folder / "classifier"))
    output = capsys.readouterr().out
    assert output.count("returns a string") == 3
    assert output.count("acceptable") == 2
    assert "MMTMMTMMTMMT" in output


def test_own_text_is_pretrained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = [f"the {noun} {verb} a new list ." for noun in ["cat", "dog", "bird"] for verb in ["sees", "hears"]]
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(sentences * 20) for _ in range(20)), encoding="utf-8")
    pretrain_on_own_text.main(str(tmp_path / "text.txt"), tmp_path / "run", steps=1)
    assert "held-out loss" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_packed_and_padded_sequences_come_out_as_alone(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "packed_sequences.py"))
    differences = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(differences) == 3
    assert max(differences) < 1e-5
