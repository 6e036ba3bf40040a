"""The numbers of a JSON file by dotted paths, and paths that name an item of a list by some of its settings.

`{"entries": [{"streams": 2, "entropy": 5.1}, {"streams": 4, "entropy": 5.3}]}` has `entries[streams=2].entropy` and
`entries[streams=4].entropy`. An item that has no settings of its own has its place in the list, from 0.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

LARGEST = 1e30  # a number beyond this measures nothing, and axes cannot be divided so far
# Fields of an item that say what was measured there, and not what came out. They name the item.
_SETTINGS: tuple[str, ...] = (
    "name",
    "protocol",
    "set",
    "split",
    "text",
    "mode",
    "sampler",
    "streams",
    "steps",
    "orders",
)
_SETTINGS += ("temperature", "top_p", "first")
_MORE = ("samples", "length", "batch", "seed")  # these as well, of items that the others do not tell apart
_BRACKETS = re.compile(r"\[([^][]*)\]")


def number(value: Any) -> float | None:
    """The value as it is if it is a finite number of a reasonable size, else None."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and abs(value) < LARGEST else None  # no NaN is below anything


def numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Every number in a parsed JSON value, with its path, in the sequence of the file. path: that of the value."""
    if (found := number(value)) is not None:
        yield path, found
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from numbers(item, f"{path}.{name}")
    elif isinstance(value, list):
        names = [_settings(item, _SETTINGS) for item in value]
        names = [
            _settings(item, _SETTINGS + _MORE) if names.count(name) > 1 else name
            for name, item in zip(names, value, strict=True)
        ]
        for place, (name, item) in enumerate(zip(names, value, strict=True)):
            yield from numbers(item, f"{path}[{name if name and names.count(name) == 1 else place}]")


def _settings(item: Any, which: Sequence[str]) -> str:
    """What tells an item of a list from others, as `mode=strided,streams=2`; empty if it has no settings."""
    given = {name: item.get(name) for name in which} if isinstance(item, dict) else {}
    words = [f"{name}={value}" for name, value in given.items() if type(value) in (int, float, str) and value != ""]
    return "" if any(re.search(r"[][,]|=.*=", word) for word in words) else ",".join(words)


def fitting(path: str, known: Collection[str]) -> list[str]:
    """The known paths that a path means if it names items of lists by some of their settings; numbers are numbers."""
    return [other for other in known if "=" in path and _fits(path, other)]


def _fits(path: str, other: str) -> bool:
    if _BRACKETS.sub("[]", path) != _BRACKETS.sub("[]", other):
        return False
    pairs = zip(_BRACKETS.findall(path), _BRACKETS.findall(other), strict=True)
    return all(_parsed(some).items() <= _parsed(whole).items() for some, whole in pairs)


def _parsed(settings: str) -> dict[str, str | float]:
    """Settings by name; a place in a list has the name of that place."""
    found: dict[str, str | float] = {}
    for word in settings.split(","):
        name, _, value = word.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            found[name.strip()] = value.strip()
    return found
