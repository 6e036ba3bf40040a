"""What sweep files are made with: members of a sweep as products, pairs and chains of changes to one base config.

A sweep file defines `get_sweep(arg)`, which returns a `Sweep`:

    members = product(axis("order.max_permuted", [1, 8, 32]), axis("order.permute", ["scatter", "window"]), seeds(3))
    return Sweep(base, members, after=("eval --streams=2,4 --no-baselines",))

The functions give tuples of members. `product`, `zip_`, `chain`, `then` and `Sweep` take these, or lists such as
`[member for member in members if member.seed != 1]`. A member's name follows
from what was set: `order.max_permuted=8,order.permute=window,seed=0`. It is the name of a folder.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from armd_jax import config as configs
from armd_jax.config import Config
from armd_jax.errors import UserError, nearest, shown

Members = tuple["Member", ...]

SWEEP = "{sweep}"  # in texts of configs and commands: the folder of the sweep
SEED = "seed"  # the axis of seeds, and the field that it sets
_SEED_FIELD = "training.seed"
_AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_LABEL = re.compile(r"[A-Za-z0-9_.+-]+")
# Columns of a report's CSV files that are no axis.
_TAKEN = frozenset(
    {"row", SEED, "member", "status", "reason", "members", "finished", "figure", "mean", "standard_error", "seeds"}
    | {"bound", "best", "baseline", "ratio", "ratio_standard_error", "ratio_seeds", "ratio_bound"}
)
_LONGEST = 200  # characters of a name: file systems take 255, and names of temporary files are a little longer


@dataclasses.dataclass(frozen=True)
class Member:
    """One training of a sweep.

    labels: (axis, how its value is written in the name), in the sequence of the name. values: by axis, for tables: the
    value of the field, or the label of a choice. overrides: dotted field -> value, set on top of the base. after:
    commands of this member beside those of the sweep.
    """

    labels: tuple[tuple[str, str], ...]
    values: Mapping[str, Any]
    overrides: Mapping[str, Any]
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the member and of its folder."""
        return ",".join(f"{axis}={label}" for axis, label in self.labels)

    @property
    def row(self) -> str:
        """The name without the seed: what members that differ only in the seed have in common."""
        return ",".join(f"{axis}={label}" for axis, label in self.labels if axis != SEED) or "base"

    @property
    def seed(self) -> int | None:
        """The seed, if there is an axis of seeds."""
        found: int | None = self.values.get(SEED)
        return found


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What `get_sweep(arg)` of a sweep file returns.

    base: the config that members change. after: `armd` commands for every member, such as "eval --streams=2,4", which
    are run one after the other when its training is finished; `--run=` with the member's folder is added. In them, and
    in texts of the config, `{sweep}/members/NAME` is the folder of a member, and waits for that member's training.
    """

    base: ml_collections.ConfigDict
    members: Sequence[Member]
    after: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.base, ml_collections.ConfigDict):
            raise UserError(f"Sweep: base={shown(self.base)}: must be an ml_collections.ConfigDict")
        _given((self.members,), "Sweep")
        object.__setattr__(self, "members", tuple(self.members))  # a list is what remains of members that were filtered
        _check_commands(self.after, "Sweep: after")


def axis(field: str, values: Iterable[Any]) -> Members:
    """One member per value of a field, such as `axis("model.width", [128, 192])`.

    Values are numbers, truth values, words, or tuples of these. Others, such as paths, need a label: see `choices`.
    """
    _check_free(field)
    members = tuple(
        Member(((field, _label(field, value)),), {field: value}, {field: value}) for value in _several(values, field)
    )
    return _checked(members, field)


def choices(name: str, options: Mapping[str, Mapping[str, Any]]) -> Members:
    """One member per labelled set of overrides.

    Example: `choices("model", {"AR": {"model.aggregator": "shift", "order.kind": "left_to_right"}, "ARMD": {}})`.
    """
    _check_free(name)
    members = tuple(
        Member(((name, label),), {name: label}, dict(overrides)) for label, overrides in _named(options, name).items()
    )
    return _checked(members, name)


def seeds(which: int | Iterable[int]) -> Members:
    """An axis of seeds: `seeds(3)` is `seeds([0, 1, 2])`. Members that differ only in it are one row of a table."""
    numbers = _several(range(which) if isinstance(which, int) else which, SEED)
    if wrong := [value for value in numbers if type(value) is not int]:
        raise UserError(f"seeds: {shown(wrong[0])} is not a whole number")
    return _checked(tuple(Member(((SEED, str(seed)),), {SEED: seed}, {_SEED_FIELD: seed}) for seed in numbers), SEED)


def product(*axes: Sequence[Member]) -> Members:
    """Every combination of the members of several axes; the last axis varies fastest."""
    return tuple(_joined(parts) for parts in itertools.product(*_given(axes, "product")))


def zip_(*axes: Sequence[Member]) -> Members:
    """The first members of all axes together, then the second, and so on."""
    lengths = [len(members) for members in _given(axes, "zip_")]
    if len(set(lengths)) > 1:
        raise UserError(f"zip_: its axes have {' and '.join(map(str, lengths))} values; they must have as many")
    return tuple(_joined(parts) for parts in zip(*axes, strict=True))


def chain(*several: Sequence[Member]) -> Members:
    """The members of one after those of the other."""
    return tuple(itertools.chain(*_given(several, "chain")))


def then(members: Sequence[Member], *commands: str) -> Members:
    """The same members, with commands of their own that follow those of the sweep's `after`."""
    _given((members,), "then")
    _check_commands(commands, "then")
    return tuple(dataclasses.replace(member, after=(*member.after, *commands)) for member in members)


def axes_of(members: Sequence[Member]) -> tuple[str, ...]:
    """The names of all axes but that of the seeds, in the sequence in which they appear."""
    return tuple(dict.fromkeys(axis for member in members for axis, _ in member.labels if axis != SEED))


def configs_of(sweep: Sweep, filled: Callable[[Member, str], str]) -> dict[str, Config]:
    """The checked config of every member by name, in the sequence of the members.

    filled: what becomes of a text of a member's config that holds `{sweep}`.
    Raises UserError if there is no member, if one cannot be trained, or if two have the same name or the same config.
    """
    found: dict[str, Config] = {}
    names: dict[str, str] = {}
    same: dict[Config, str] = {}
    for member in sweep.members:
        name = member.name
        if not name or len(name) > _LONGEST:
            raise UserError(f"member {shown(name)}: a name must have 1 to {_LONGEST} characters; use labels (choices)")
        if (other := names.setdefault(name.casefold(), name)) != name or name in found:
            raise UserError(f"members {name!r} and {other!r}: two members have the same name")
        values = _plain(sweep.base)
        for field, value in member.overrides.items():
            _set(values, field, value, name)
        try:
            config = configs.from_config_dict(_filled(values, functools.partial(filled, member)))
            configs.check_new_run(config)
        except UserError as error:
            raise UserError(f"member {name}: {error}") from error
        if (other := same.setdefault(config, name)) != name:
            raise UserError(f"members {other!r} and {name!r}: two members have the same config")
        found[name] = config
    if not found:
        raise UserError("the sweep has no members")
    return found


def _check_commands(commands: Any, where: str) -> None:
    if not isinstance(commands, tuple | list) or not all(isinstance(command, str) for command in commands):
        raise UserError(f"{where}={shown(commands)}: expected commands such as ('eval --streams=2,4',)")


def _plain(base: ml_collections.ConfigDict) -> dict[str, Any]:
    """The values of the base, which stays as it is. The same rows of tokens serve all members."""
    try:
        values: dict[str, Any] = base.to_dict()
    except config_dict.RequiredValueError as error:
        raise UserError("Sweep: base: a value that it requires is not set (a required placeholder)") from error
    for section, default in configs.default_config_dict().to_dict().items():
        if isinstance(default, dict):
            values.setdefault(section, {})
    data = values["data"]
    if isinstance(data, dict) and not data.get("cache_dir"):
        data["cache_dir"] = f"{SWEEP}/data"
    return values


def _set(values: dict[str, Any], field: str, value: Any, name: str) -> None:
    section, _, key = field.partition(".")
    if section not in values:
        raise UserError(f"member {name}: unknown field {field!r}{nearest(section, list(values))}")
    if not isinstance(values[section], dict) or not key:
        raise UserError(f"member {name}: {field!r} is not the name of a field, such as model.width")
    values[section][key] = value


def _filled(value: Any, fill: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, fill) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_filled(item, fill) for item in value)
    return fill(value) if isinstance(value, str) and SWEEP in value else value


def _label(field: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(_label(field, item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def _joined(parts: Sequence[Member]) -> Member:
    labels = tuple(label for part in parts for label in part.labels)
    names = [name for name, _ in labels]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the axis {twice[0]!r} is used twice in one product or zip_")
    fields = [field for part in parts for field in part.overrides]
    if twice := [field for field in fields if fields.count(field) > 1]:
        raise UserError(f"the field {twice[0]!r} is set by two axes of one product or zip_")
    return Member(
        labels,
        {name: value for part in parts for name, value in part.values.items()},
        {field: value for part in parts for field, value in part.overrides.items()},
        tuple(command for part in parts for command in part.after),
    )


def _check_free(name: str) -> None:
    if name in _TAKEN:
        raise UserError(f"the axis {name!r}: a report has a column of this name; choose another (seeds: `seeds`)")


def _checked(members: Members, name: str) -> Members:
    if not _AXIS.fullmatch(name):
        raise UserError(f"the axis {shown(name)}: a name must be a word of letters, digits, '_' and '.'")
    for member in members:
        ((_, label),) = member.labels
        if not _LABEL.fullmatch(label):
            raise UserError(
                f"the axis {name!r}: {shown(label)} cannot be part of a folder's name (letters, digits, '_', '.', '+',"
                f" '-'); give it a label: choices({name!r}, {{'LABEL': {{'FIELD': VALUE}}}})"
            )
    return members


def _several(values: Any, name: str) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"the axis {name!r}: {shown(values)} is not a list of values")
    if not (found := tuple(values)):
        raise UserError(f"the axis {name!r} has no values")
    return found


def _named(options: Any, name: str) -> dict[str, Mapping[str, Any]]:
    if not isinstance(options, Mapping) or not options:
        raise UserError(
            f"choices({name!r}): expected labels with their overrides, as in {{'AR': {{'model.width': 64}}}}"
        )
    for label, overrides in options.items():
        if not isinstance(label, str) or not isinstance(overrides, Mapping):
            raise UserError(f"choices({name!r}): {shown(label)}: expected a label and its overrides")
    return dict(options)


def _given(axes: Any, function: str) -> Sequence[Sequence[Member]]:
    if not axes:
        raise UserError(f"{function}: no members were given")
    for members in axes:
        if not isinstance(members, tuple | list) or not all(isinstance(member, Member) for member in members):
            raise UserError(f"{function}: {shown(members)} is not made by axis, choices, seeds, product, zip_ or chain")
    found: Sequence[Sequence[Member]] = axes
    return found
