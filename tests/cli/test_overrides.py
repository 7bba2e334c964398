"""`key=value` changes a field, under the field's own type; everything else is refused with what would fit."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from mabert_cli.overrides import OverrideError, apply_overrides, overridable


@dataclass(frozen=True)
class Inner:
    pattern: str = "MT"
    size: int = 4
    rate: float | int = 0.1


@dataclass(frozen=True)
class Outer:
    model: Inner = field(default_factory=Inner)
    sources: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.98)
    lengths: tuple[int, ...] = (128, 512)
    steps: int = 10
    learning_rate: float = 1e-3
    resume: bool = True
    folder: Path = Path("out")
    packing: Literal["documents", "full-sentences"] = "documents"
    keep: int | None = None
    name: str | None = None
    rank: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.steps > 100 and self.learning_rate > 0.01:
            raise ValueError("both too large")


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("steps=1_000", 1000),
        ("learning_rate=3e-3", 0.003),
        ("learning_rate=1", 1.0),
        ("resume=false", False),
        ("resume=Yes", True),
        ("folder=a/b", Path("a/b")),
        ("packing=full-sentences", "full-sentences"),
        ("keep=3", 3),
        ("keep=none", None),
        ("name=none", None),
        ("name=7", "7"),
        ("rank=auto", "auto"),
        ("rank=12", 12),
        ("sources=a.txt, b.txt", ("a.txt", "b.txt")),
        ("sources=", ()),
        ("sources=x=y", ("x=y",)),
        ("betas=0.8,0.9", (0.8, 0.9)),
        ("lengths=64", (64,)),
    ],
)
def test_a_value_is_read_as_the_type_of_its_field(assignment: str, expected: Any) -> None:
    value = getattr(apply_overrides(Outer(), [assignment]), assignment.partition("=")[0])
    assert value == expected
    assert type(value) is type(expected)


def test_a_dot_reaches_into_an_inner_config() -> None:
    before = Outer()
    after = apply_overrides(before, ["model.pattern=TTT", "steps=5", "model.size=8"])
    assert after == dataclasses.replace(before, steps=5, model=Inner(pattern="TTT", size=8))
    assert before == Outer()


def test_all_changes_are_checked_together() -> None:
    with pytest.raises(ValueError, match="both too large"):
        apply_overrides(Outer(), ["steps=200", "learning_rate=0.1"])
    crossing = apply_overrides(dataclasses.replace(Outer(), learning_rate=0.1), ["steps=200", "learning_rate=0.001"])
    assert crossing.steps == 200


def test_no_assignment_changes_nothing() -> None:
    assert apply_overrides(Outer(), []) == Outer()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "'steps' is not of the form key=value"),
        ("stps=3", "there is no field 'stps'. Did you mean steps?"),
        ("pattern=MMT", "there is no field 'pattern'. Did you mean model.pattern?"),
        ("model.patern=MMT", "Did you mean model.pattern"),
        ("zzz=1", "There are: model.pattern, model.size, model.rate, sources,"),
        ("model=3", "there is no field 'model'"),
        ("steps=1.5", "steps=1.5 does not fit: steps takes a whole number."),
        ("steps=", "steps takes a whole number"),
        ("learning_rate=fast", "learning_rate takes a number."),
        ("resume=maybe", "resume takes true or false."),
        ("packing=rows", "packing takes one of documents, full-sentences."),
        ("betas=0.9", r"betas takes 2 values by comma (a number, a number)."),
        ("lengths=128,x", "lengths takes values by comma, each a whole number."),
        ("keep=many", "keep takes a whole number or none."),
        ("rank=half", "rank takes a whole number or one of auto."),
        ("model.rate=high", "model.rate takes a number or a whole number."),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(assignment: str, message: str) -> None:
    with pytest.raises(OverrideError) as refused:
        apply_overrides(Outer(), [assignment])
    assert message in str(refused.value)


def test_a_key_comes_once() -> None:
    with pytest.raises(OverrideError, match="steps is given twice"):
        apply_overrides(Outer(), ["steps=1", "steps=2"])


def test_the_model_config_is_reached_by_its_own_fields() -> None:
    from mabert.config import MaBertConfig

    @dataclass(frozen=True)
    class Holder:
        model: MaBertConfig

    config = apply_overrides(Holder(MaBertConfig.tiny()), ["model.pattern=MT", "model.conv_mode=causal"]).model
    assert (config.pattern, config.num_hidden_layers, config.conv_mode, config.hidden_size) == ("MT", 2, "causal", 128)
    assert "model.id2label" not in overridable(Holder(MaBertConfig.tiny()))
    with pytest.raises(ValueError, match="unknown letter X"):
        apply_overrides(Holder(MaBertConfig.tiny()), ["model.pattern=MX"])


def test_a_model_config_is_reached_by_the_fields_of_our_class_above_it() -> None:
    from mabert.causal_config import TransMambaConfig

    @dataclass(frozen=True)
    class Holder:
        model: TransMambaConfig

    held = Holder(TransMambaConfig(num_hidden_layers=3))
    changed = apply_overrides(held, ["model.hidden_size=96", "model.transpoints=0,5,32"]).model
    assert (changed.hidden_size, changed.layer_transpoints()) == (96, [0, 5, 32])
    assert apply_overrides(held, ["model.transpoints=V2"]).model.transpoints == "V2"
    assert apply_overrides(held, ["model.transpoints=7"]).model.layer_transpoints() == [7, 7, 7]
    assert "model.id2label" not in overridable(held)


def test_a_rank_left_to_the_model_follows_its_size() -> None:
    from mabert.config import MaBertConfig

    @dataclass(frozen=True)
    class Holder:
        model: MaBertConfig

    grown = apply_overrides(Holder(MaBertConfig.tiny()), ["model.hidden_size=256"]).model
    assert grown.time_step_rank == math.ceil(256 / 16)
    kept = apply_overrides(Holder(MaBertConfig.tiny(time_step_rank=3)), ["model.hidden_size=256"]).model
    assert kept.time_step_rank == 3
