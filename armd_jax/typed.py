"""Dataclasses from plain values (parsed JSON, ConfigDicts), every field checked against its annotation.

Configs, results and manifests are frozen dataclasses. Outside the program they are nested dicts that anybody may have
written, and this module is the one way in: an unknown field, a missing one or a value of the wrong type is a
`UserError` of one line that names the field.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from armd_jax.errors import UserError, nearest, shown

T = TypeVar("T")


class _Limits(NamedTuple):
    """The arguments of `build` of the same names."""

    largest: int | None
    any_text: bool


def build(cls: type[T], values: Any, where: str = "", largest: int | None = None, any_text: bool = False) -> T:
    """An instance of the dataclass `cls` from a dict of plain values.

    Fields may be int, float, str, bool, a `Literal` of strings, another dataclass, `X | None`, `tuple[X, ...]` or
    `dict[str, X]`. A whole number is accepted for a float, and a single value for a tuple.

    where: dotted name of the dict inside what was read, for messages.
    largest: if given, numbers must lie in -largest .. largest.
    any_text: whether a text may hold a NUL, as what a model wrote may and no name or path does.
    Raises UserError if a field is unknown, missing (and without a default), or of the wrong type.
    """
    if not isinstance(values, dict):
        got = type(values).__name__
        raise UserError(f"{where or 'config'}={shown(values)}: expected a section with fields, got {got}")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in hints:
            # Only the last part of the dotted name is compared, but the whole name is suggested.
            close = difflib.get_close_matches(str(name)[:200], list(hints), n=1, cutoff=0.5)
            hint = f"; did you mean {prefix + close[0]!r}?" if close else f"; known: {', '.join(hints)}"
            raise UserError(f"unknown field {shown(prefix + str(name))}{hint}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # T is a dataclass; there is no bound that says so
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in values and not has_default:
            raise UserError(f"{prefix}{field.name} is missing")
        if field.metadata.get("optional") and field.name in values and _says_none(values[field.name]):
            values = values | {field.name: ""}
    limits = _Limits(largest, any_text)
    return cls(**{name: _coerce(hints[name], value, prefix + name, limits) for name, value in values.items()})


def _says_none(value: Any) -> bool:
    """Whether a value for an optional text says that there is none, as people write it on a command line or in JSON."""
    return value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null"))


def field(
    default: T,
    *,
    at_least: float | None = None,
    above: float | None = None,
    fraction: Literal["open", "closed"] | None = None,
    check: Callable[[Any, str], None] | None = None,
    **properties: Any,
) -> T:
    """A dataclass field with its properties, which `check` and whoever else asks find in the field's metadata.

    at_least, above: bounds of a number. fraction: a number in [0, 1) ("open") or in [0, 1] ("closed").
    check: called with the value and the field's dotted name; raises UserError if the value is none for this field.
    properties: `optional`: a text that is empty if there is none; `build` takes None, "none" and "null" for that too.
        Others belong to whoever reads them.
    """
    properties |= {"at_least": at_least, "above": above, "fraction": fraction, "check": check}
    return dataclasses.field(default=default, metadata=properties)


def check(instance: Any, where: str) -> None:
    """Raises UserError if a value is outside the bounds or the closed set of names that its field declares.

    A field's own `check` is called as well.
    `build` checks names as well; instances that a program constructs itself come here unchecked.
    """
    hints = typing.get_type_hints(type(instance))
    for one in dataclasses.fields(instance):
        value, name = getattr(instance, one.name), f"{where}.{one.name}"
        if typing.get_origin(hints[one.name]) is Literal:
            check_choice(hints[one.name], value, name)
        low, above = one.metadata.get("at_least"), one.metadata.get("above")
        if low is not None and value < low:
            raise UserError(f"{name}={value}: must be at least {low}")
        if above is not None and value <= above:
            raise UserError(f"{name}={value}: must be above {above}")
        if one.metadata.get("fraction") == "open" and not 0 <= value < 1:
            raise UserError(f"{name}={value}: must be in [0, 1)")
        if one.metadata.get("fraction") == "closed" and not 0 <= value <= 1:
            raise UserError(f"{name}={value}: must be in [0, 1]")
        if one.metadata.get("check"):
            one.metadata["check"](value, name)


def choices(literal: Any) -> tuple[str, ...]:
    """The names of a `Literal`: the one list of a closed set, for loops, messages and command-line choices."""
    if typing.get_origin(literal) is not Literal:
        raise TypeError(f"{literal} is not a Literal")
    return typing.get_args(literal)


def check_choice(literal: Any, value: str, where: str) -> None:
    """Raises UserError, naming the nearest known name, if `value` is not one of the `Literal`'s names."""
    known = choices(literal)
    if value not in known:
        raise UserError(f"{where}={shown(value)} is not known{nearest(value, known)}")


def check_span(value: Sequence[int], where: str) -> None:
    """Raises UserError if `value` is neither empty nor (first, count), both from 1."""
    if value and (len(value) != 2 or min(value) < 1):
        raise UserError(f"{where}={tuple(value)}: expected two numbers from 1, the first and how many, such as 100,5")


def check_text(value: str, where: str) -> None:
    """Raises UserError if `value` has a code point that is no character, and that UTF-8 cannot encode."""
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{where}={shown(value)}: holds half a surrogate pair, which is no character")


def _coerce(hint: Any, value: Any, where: str, limits: _Limits) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, *limits)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        _check_type(str, value, where)
        check_choice(hint, value, where)
        return value
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _coerce(inner, value, where, limits)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple(_coerce(arguments[0], item, where, limits) for item in items)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}={shown(value)}: expected a section with fields, got {type(value).__name__}")
        return {name: _coerce(arguments[1], item, f"{where}.{name}", limits) for name, item in value.items()}
    return _scalar(hint, value, where, limits)


def _scalar(hint: type, value: Any, where: str, limits: _Limits) -> Any:
    largest = limits.largest
    if hint in (int, float) and isinstance(value, int) and largest is not None and abs(value) > largest:
        size = f"={value}" if value.bit_length() <= 256 else f": a number of {value.bit_length()} bits"
        raise UserError(f"{where}{size}: must be in {-largest} .. {largest}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    _check_type(hint, value, where)
    if hint is float and not math.isfinite(value):
        raise UserError(f"{where}={value!r}: must be a finite number")
    if hint is str and limits.any_text:
        check_text(value, where)
    elif hint is str and re.search("[\0\ud800-\udfff]", value):
        raise UserError(f"{where}={shown(value)}: holds a NUL or half a surrogate pair, which no name or path does")
    return value


def _check_type(hint: type, value: Any, where: str) -> None:
    # bool is a subclass of int, but True is no number here.
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}={shown(value)}: expected {hint.__name__}, got {type(value).__name__}")


def to_json(value: Any, indent: int | None = None) -> str:
    """A dataclass, or a tree of dicts, lists, numbers and texts, as JSON. JSON has no infinity and no NaN: null."""
    return json.dumps(_finite(as_plain(value)), indent=indent)


def as_plain(value: Any) -> Any:
    """A dataclass as a dict, and everything inside it likewise.

    A field with the property `absent_if_none` has no key if it is None.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {
            field.name: as_plain(item)
            for field, item in fields
            if item is not None or not field.metadata.get("absent_if_none")
        }
    if isinstance(value, dict):
        return {name: as_plain(item) for name, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
