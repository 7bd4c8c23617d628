"""Dataclasses of settings to command-line flags, and parsed flags back to dataclasses; knows no single setting.

A field ``max_model_len`` becomes ``--max-model-len``, with the type of its annotation, its default, and the string under it
as help. So a setting is named, typed and explained in one place only.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

Settings = TypeVar("Settings")

Bounds = Mapping[str, tuple[float, float]]
"""Smallest and largest allowed value of a number, by field."""


class UsageError(Exception):
    """Flags that cannot be what was meant; the program ends with exit code 2."""


def add_flags(
    parser: argparse._ActionsContainer,
    kind: type,
    *,
    skip: Collection[str] = (),
    choices: Mapping[str, Collection[str]] | None = None,
    bounds: Bounds | None = None,
    aliases: Mapping[str, str] | None = None,
    show_defaults: bool = True,
) -> None:
    """Add a flag for each field of the dataclass ``kind``.

    A flag that is not given leaves no attribute behind, so the dataclass keeps its say on defaults. A number outside its
    ``bounds`` is refused when it is parsed. ``aliases`` are second
    names of flags. ``show_defaults`` False is for dataclasses whose defaults are overruled.
    """
    hints = typing.get_type_hints(kind)
    docs = field_docs(kind)
    for field in dataclasses.fields(kind):
        if field.name in skip:
            continue
        shape: dict[str, Any] = _shape(hints[field.name], (bounds or {}).get(field.name))
        if choices and field.name in choices:
            repeats = {"action": "append"} if typing.get_origin(hints[field.name]) is tuple else {}
            shape = {"choices": choices[field.name], **repeats}
        default = None if field.default is dataclasses.MISSING else field.default
        parser.add_argument(
            flag_name(field.name),
            *([aliases[field.name]] if aliases and field.name in aliases else []),
            default=argparse.SUPPRESS,
            help=_help(docs[field.name], default if show_defaults else None),
            **shape,
        )


def read_flags(arguments: argparse.Namespace, kind: type[Settings], **given: Any) -> Settings:
    """A ``kind`` from the flags that were given; ``given`` are fields that have no flag."""
    return kind(**given_flags(arguments, kind, skip=given.keys()), **given)


def given_flags(arguments: argparse.Namespace, kind: type, *, skip: Collection[str] = ()) -> dict[str, Any]:
    """Fields of ``kind`` whose flags were given."""
    names = [field.name for field in dataclasses.fields(kind) if field.name not in skip]  # type: ignore[arg-type]
    values = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def flag_name(field: str) -> str:
    """``max_model_len`` as ``--max-model-len``."""
    return "--" + field.replace("_", "-")


@functools.cache
def field_docs(kind: type) -> Mapping[str, str]:
    """The string under each field of a dataclass, on one line; Python keeps it in the source only."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for node, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[node.target.id] = " ".join(text.split())
    return docs


def _shape(hint: Any, bounds: tuple[float, float] | None) -> dict[str, Any]:
    """Arguments of ``add_argument`` for a type: str, int, float, bool, tuple[X, ...], or one of them or None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return {"action": "append", **_shape(typing.get_args(hint)[0], bounds)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint is str:
        return {"metavar": "TEXT"}
    if hint in (int, float):
        return {"type": _number(hint, *(bounds or (-math.inf, math.inf))), "metavar": "N" if hint is int else "X"}
    raise TypeError(f"no flag can be made for a field of type {hint}")


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            allowed = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def _help(doc: str, default: Any) -> str:
    text = doc.replace("%", "%%").rstrip(".")
    if default in (None, (), "") or isinstance(default, bool):
        return text
    return f"{text} (default: {default})"
