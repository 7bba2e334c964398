"""The command line as a whole: quick to start, helpful, and without tracebacks for bad input."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mabert_cli import environment
from mabert_cli.app import app

COMMANDS = ["tokenizer", "pretrain", "finetune", "predict", "fill-mask", "generate", "encode", "env"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plain(text: str) -> str:
    """Without the line breaks and frames that depend on the terminal's width."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_help_comes_within_a_second_and_without_heavy_imports() -> None:
    code = (
        "import sys, json, mabert_cli\n"
        "sys.argv = ['mabert', '--help']\n"
        "try: mabert_cli.main()\n"
        "except SystemExit: pass\n"
        "print(json.dumps([name for name in ('torch', 'transformers', 'mabert', 'numpy') if name in sys.modules]))"
    )
    before = os.times()
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = os.times()
    # Time on the processor: on a busy machine the clock on the wall says little.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert json.loads(finished.stdout.splitlines()[-1]) == []


def test_help_names_every_command() -> None:
    text = run("--help").output
    assert all(re.search(rf"\b{command}\b", text) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_text_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: mabert {command}" in plain(result.output)


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("mabert")
    assert subprocess.run([script, "--help"], check=True, capture_output=True).returncode == 0


def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    result = run("tokenizer", tmp_path / "missing.txt", "--output", tmp_path / "tokenizer")
    assert result.exit_code == 2
    assert "missing.txt: no such file" in result.stderr
    assert "Traceback" not in result.output
    assert "--debug" in result.stderr


def test_debug_lets_the_error_through(tmp_path: Path) -> None:
    result = run("--debug", "tokenizer", tmp_path / "missing.txt", "--output", tmp_path / "tokenizer")
    assert isinstance(result.exception, ValueError)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(environment, "versions", broken)
    assert isinstance(run("env").exception, ZeroDivisionError)


def test_a_message_with_brackets_is_printed_as_it_is(tmp_path: Path) -> None:
    result = run("tokenizer", tmp_path / "[MASK].txt", "--output", tmp_path / "tokenizer")
    assert "[MASK].txt" in result.stderr


def test_the_log_of_the_package_is_shown_and_stays_with_the_root_logger(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    run("env")
    logger = logging.getLogger("mabert.ops.backend")
    assert logger.isEnabledFor(logging.INFO)
    logger.info("said once")
    assert "said once" in caplog.text
    assert len(logging.getLogger("mabert").handlers) == 1


def test_env_shows_versions_and_tests_every_backend() -> None:
    from mabert.ops.backend import BACKENDS, OPS

    result = run("env")
    assert result.exit_code == 0
    for name in ("torch", "transformers", "python", "threads for torch", *OPS, *(b.name for b in BACKENDS)):
        assert name in result.output
    assert result.output.count("ok, error") >= len(OPS)
    assert "FAILED" not in result.output


def test_env_fails_where_a_backend_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from mabert.ops.depthwise_conv import fallback

    correct = fallback.depthwise_conv
    monkeypatch.setattr(fallback, "depthwise_conv", lambda *inputs: correct(*inputs) * 1.01)
    result = run("env")
    assert result.exit_code == 1
    assert "FAILED torch on cpu: depthwise_conv: error" in plain(result.output)


def test_env_says_why_a_backend_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from mabert.ops import backend

    first, *others = backend.BACKENDS
    absent = dataclasses.replace(first, missing=lambda device: "no compiler")
    monkeypatch.setattr(backend, "BACKENDS", (absent, *others))
    result = run("env")
    assert result.exit_code == 0
    assert plain(result.output).count(f"missing {first.name} on cpu: no compiler") == 1
