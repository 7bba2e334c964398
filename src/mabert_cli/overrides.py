"""`key=value` on the command line: change fields of a frozen config, checked against the fields' own types."""

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

Config = TypeVar("Config")

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

NOTHING_FIXED: Mapping[str, str] = MappingProxyType({})


class OverrideError(ValueError):
    """A `key=value` that cannot be applied; the message says why, and what would fit."""


def build_config(
    recipe: Callable[..., Config], assignments: Iterable[str], fixed: Mapping[str, str] = NOTHING_FIXED
) -> Config:
    """Call a recipe with those of its parameters that are assigned, and change its config's fields by the rest.

    Raises:
        OverrideError: a parameter without default is missing, or as `apply_overrides`.
    """
    values = pairs(assignments)
    parameters = inspect.signature(recipe, eval_str=True).parameters
    missing = [name for name, spec in parameters.items() if spec.default is spec.empty and name not in values]
    if missing:
        raise OverrideError(f"recipe {recipe.__name__} needs {', '.join(f'{name}=…' for name in missing)}.")
    given = {
        name: parse(values.pop(name), spec.annotation, name) for name, spec in parameters.items() if name in values
    }
    return apply_overrides(recipe(**given), [f"{key}={text}" for key, text in values.items()], fixed)


def pairs(assignments: Iterable[str]) -> dict[str, str]:
    """`key=value` texts as a mapping."""
    found: dict[str, str] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise OverrideError(f"{assignment!r} is not of the form key=value.")
        if key in found:
            raise OverrideError(f"{key} is given twice.")
        found[key] = text
    return found


def apply_overrides(config: Config, assignments: Iterable[str], fixed: Mapping[str, str] = NOTHING_FIXED) -> Config:
    """A copy of a dataclass with fields changed, all at once, so that its own checks see the whole.

    `outer.inner=value` reaches into a field that is itself a dataclass; `outer=none` empties it, where it may be empty.
    `fixed` names fields that cannot be changed, and why.

    Raises:
        OverrideError: an assignment has no `=`, names an unknown or fixed field, comes twice, or its value has the
            wrong type.
    """
    fields = overridable(config)
    changes: dict[str, Any] = {}
    for key, text in pairs(assignments).items():
        if key in fixed:
            raise OverrideError(f"{key} cannot be set: it {fixed[key]}.")
        if key not in fields:
            raise OverrideError(unknown("field", key, fields))
        changes[key] = parse(text, fields[key], key)
    return replaced(config, changes)


def overridable(config: Any) -> dict[str, Any]:
    """The fields that can be changed and their types, in order; those of an inner dataclass after a dot."""
    found: dict[str, Any] = {}
    for name, annotation in own_fields(config).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            if types.NoneType in get_args(annotation):
                found[name] = types.NoneType
            found |= {f"{name}.{inner}": kind for inner, kind in overridable(value).items()}
        else:
            found[name] = annotation
    return found


def own_fields(config: Any) -> dict[str, Any]:
    """The fields that the class itself or one of ours above it declares, and their types: not those that a model config
    inherits from transformers."""
    package = type(config).__module__.partition(".")[0]
    ours = [kind for kind in reversed(type(config).__mro__) if kind.__module__.partition(".")[0] == package]
    annotations = {name: kind for own in ours for name, kind in inspect.get_annotations(own, eval_str=True).items()}
    return {
        field.name: annotations[field.name]
        for field in dataclasses.fields(config)
        if field.init and field.name in annotations
    }


def replaced(config: Any, changes: dict[str, Any]) -> Any:
    """The dataclass with fields changed; a dotted name changes a field of an inner one."""
    own = {name: value for name, value in changes.items() if "." not in name}
    for outer in dict.fromkeys(name.partition(".")[0] for name in changes if "." in name):
        prefix = f"{outer}."
        inner = {name.removeprefix(prefix): value for name, value in changes.items() if name.startswith(prefix)}
        own[outer] = replaced(getattr(config, outer), inner)
    return dataclasses.replace(config, **derived_again(config) | own)


def derived_again(config: Any) -> dict[str, str]:
    """The fields that hold what "auto" gave them: they follow when the fields change that they were derived from."""
    return {
        name: "auto"
        for name, annotation in own_fields(config).items()
        if Literal["auto"] in get_args(annotation)
        and getattr(dataclasses.replace(config, **{name: "auto"}), name) == getattr(config, name)
    }


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: the nearest ones, or all where none is near."""
    known = list(known)
    tails = {candidate.rpartition(".")[2]: candidate for candidate in known}
    near = [tails[name]] if name in tails else get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"there is no {what} {name!r}. Did you mean {' or '.join(near)}?"
    return f"there is no {what} {name!r}. There are: {', '.join(known)}."


def parse(text: str, annotation: Any, key: str) -> Any:
    """The value that a text stands for under a type: bool, int, float, str, Path, Literal, tuples by comma, unions.

    Raises:
        OverrideError: the text does not fit; the message names the key and the type.
    """
    try:
        return value_of(text, annotation)
    except ValueError:
        raise OverrideError(f"{key}={text} does not fit: {key} takes {description(annotation)}.") from None


def value_of(text: str, annotation: Any) -> Any:
    """As `parse`, with a bare ValueError."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return first_fit(text, arguments)
    if origin is Literal:
        return chosen(text, {str(choice): choice for choice in arguments})
    if origin in (tuple, Sequence):
        parts = [part.strip() for part in text.split(",")] if text else []
        kinds = arguments if is_fixed(annotation) else arguments[:1] * len(parts)
        return tuple(value_of(part, kind) for part, kind in zip(parts, kinds, strict=True))
    if annotation is types.NoneType:
        return chosen(text.lower(), {"none": None})
    if annotation is bool:
        return chosen(text.lower(), BOOLEANS)
    if annotation is Path:
        return Path(text).expanduser()
    if annotation in (int, float, str):
        return annotation(text)
    raise ValueError(text)


def chosen(text: str, choices: dict[str, Any]) -> Any:
    """The choice of that name; ValueError where there is none."""
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def is_fixed(annotation: Any) -> bool:
    """Whether a tuple has a fixed number of members, rather than any number of one type."""
    return get_origin(annotation) is tuple and get_args(annotation)[-1] is not Ellipsis


def first_fit(text: str, members: Sequence[Any]) -> Any:
    """The value under the first member of a union that fits; text comes last, since everything is text."""
    for member in sorted(members, key=lambda kind: kind in (str, Path)):
        try:
            return value_of(text, member)
        except ValueError:
            continue
    raise ValueError(text)


def description(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(description(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, Sequence):
        if is_fixed(annotation):
            return f"{len(arguments)} values by comma ({', '.join(map(description, arguments))})"
        return f"values by comma, each {description(arguments[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return words.get(annotation, "none" if annotation is types.NoneType else str(annotation))
