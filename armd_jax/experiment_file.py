"""The edge of the configuration: experiment files, and `--config.section.field=value` words of the command line.

An experiment file defines `get_config(arg)`, which returns an `ml_collections.ConfigDict`. It may import other files of
its folder and of the one above, so that one experiment can start from another: `from owt_small import get_config as
owt_small`.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import warnings
from collections.abc import Generator, Sequence
from typing import Any, get_type_hints

import ml_collections

from armd_jax import files
from armd_jax.config import Config, from_config_dict
from armd_jax.errors import UserError, nearest, shown

_LONGEST_VALUE = 1000  # characters of a number or a tuple


class _SourceOnly(importlib.machinery.SourceFileLoader):
    """Runs the source itself: it leaves no __pycache__ beside the user's file and reads none."""

    def path_stats(self, path: Any) -> Any:
        raise OSError(f"bytecode of {path!r} is neither read nor written")


class _Siblings(importlib.abc.MetaPathFinder):
    """Finds the Python files beside an experiment file, as Python does for a script that is run."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        file = self._folder / f"{fullname}.py"
        if path is not None or not file.is_file():
            return None
        loader = _SourceOnly(fullname, str(file))
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


@contextlib.contextmanager
def _siblings_of(file: pathlib.Path) -> Generator[None]:
    """Lets the file import its siblings, and forgets them afterwards: another folder may have files of that name.

    What nobody else knows is looked for in the folder above, too, so that a sweep can start from an experiment there.
    """
    folder = file.parent.resolve()
    first, last, before = _Siblings(folder), _Siblings(folder.parent), set(sys.modules)
    sys.meta_path.insert(0, first)
    sys.meta_path.append(last)
    try:
        yield
    finally:
        sys.meta_path.remove(first)
        sys.meta_path.remove(last)
        for name in set(sys.modules) - before:
            if isinstance(getattr(sys.modules[name], "__loader__", None), _SourceOnly):
                del sys.modules[name]


def load_config_file(spec: str) -> ml_collections.ConfigDict:
    """The ConfigDict that `get_config(arg)` of an experiment file returns; `spec` is `file.py` or `file.py:arg`.

    `spec` may also be the config.json of a run, or another file that has a resolved config as JSON.
    """
    if spec.endswith(".json"):
        return _stored_config(spec)
    config: ml_collections.ConfigDict = load(spec, "get_config", ml_collections.ConfigDict, "ml_collections.ConfigDict")
    return config


def _stored_config(path: str) -> ml_collections.ConfigDict:
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={path}: there is no file {path!r}")
    try:
        return ml_collections.ConfigDict(dataclasses.asdict(from_config_dict(files.read_json(pathlib.Path(path)))))
    except UserError as error:
        raise UserError(f"--config={path}: {error}") from error


def load(spec: str, function: str, returned: type, called: str) -> Any:
    """What a function of a Python file returns; `spec` is `file.py` or `file.py:arg`, and gives its argument.

    returned, called: what it must return, and how that is called in a message.
    Raises UserError if the file or the function fails, or if it returns anything else.
    """
    path, colon, arg = spec.partition(":")
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"--config={spec}: there is no file {path!r}")
    if file.suffix != ".py":
        raise UserError(f"--config={spec}: {path!r} is not a Python file")
    with _siblings_of(file):
        loader = _SourceOnly(file.stem, str(file))
        loader_spec = importlib.util.spec_from_file_location(file.stem, file, loader=loader)
        assert loader_spec is not None
        module = importlib.util.module_from_spec(loader_spec)
        try:
            loader.exec_module(module)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # whatever it raises is the user's to mend
            raise UserError(f"--config={spec}: the file fails with {type(error).__name__}: {error}") from error
        if not hasattr(module, function):
            raise UserError(f"--config={spec}: the file defines no {function}(arg)")
        try:
            found = getattr(module, function)(*([arg] if colon else []))
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"--config={spec}: {function} fails with {type(error).__name__}: {error}") from error
    if not isinstance(found, returned):
        raise UserError(f"--config={spec}: {function} must return an {called}")
    return found


def apply_overrides(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Applies command-line words `--config.a.b=v` (or `--config.a.b v`) in place; UserError on any other word."""
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            raise UserError(f"unknown argument {word!r}; fields are set with --config.section.field=value")
        name, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            if not words:
                raise UserError(f"{word!r} has no value; write --config.{name}=value")
            value = words.pop(0)
        set_field(config, name, value)


def set_field(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    """Sets the field with the dotted `name` from its text form, checked against the field's present type."""
    node: Any = config
    parts = name.split(".")
    for depth, part in enumerate(parts):
        known = list(node.keys()) if isinstance(node, ml_collections.ConfigDict) else []
        if part not in known:
            prefix = ".".join(parts[:depth] + [""]) if depth else ""
            raise UserError(
                f"unknown field {shown(name)}{nearest(prefix + part, [prefix + other for other in known])}"
                if known
                else f"unknown field {shown(name)}: {'.'.join(parts[:depth])!r} is a single value"
            )
        if depth < len(parts) - 1:
            node = node[part]
    old = node[parts[-1]]
    if old is None:  # what an experiment file sets for "none" has no type; the default of the field does
        default: Any = Config()
        old = functools.reduce(lambda section, part: getattr(section, part, None), parts, default)
    if isinstance(old, ml_collections.ConfigDict):
        raise UserError(f"{name}={shown(text)}: a section; set one of its fields: {', '.join(old.keys())}")
    with node.unlocked(), node.ignore_type():
        node[parts[-1]] = _parse(name, text, old)


def _parse(name: str, text: str, old: Any) -> Any:
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"{name}={shown(text)}: expected true or false (default {old})")
        return text.lower() in ("true", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about a text that no program holds
            value = ast.literal_eval(text) if len(text) <= _LONGEST_VALUE else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = None
    if isinstance(old, tuple | list) and _holds_texts(name):
        if isinstance(value, tuple | list):  # as Python writes it
            return tuple(map(str, value))
        return tuple(item.strip() for item in text.split(",")) if text.strip() else ()
    if isinstance(old, tuple | list):
        value = (value,) if isinstance(value, int) else value
        if isinstance(value, tuple | list) and all(type(item) is int for item in value):
            return tuple(value)
        raise UserError(f"{name}={shown(text)}: expected whole numbers such as 1,2,4 (default {tuple(old)})")
    if isinstance(old, float) and type(value) is int and value.bit_length() < 64:
        value = float(value)
    if type(value) is not type(old):
        raise UserError(f"{name}={shown(text)}: expected {type(old).__name__} (default {old!r})")
    return value


def _holds_texts(name: str) -> bool:
    """Whether the field with this dotted name is a tuple of texts."""
    section, _, field = name.partition(".")
    return bool(get_type_hints(type(getattr(Config(), section, None))).get(field) == tuple[str, ...])


# --- what experiment files are made with ----------------------------------------------------------------------------


def plain_or_smoke(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
    """What `get_config(arg)` returns: the experiment itself, or for `smoke` the same shrunk to a minute.

    Raises UserError if `arg` is anything else.
    """
    if arg not in ("", "smoke"):
        raise UserError(f"experiment argument {arg!r} is not known; it takes 'smoke' or what its docstring names")
    return shrink_to_a_minute(config) if arg == "smoke" else config


def shrink_to_a_minute(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks an experiment to a minute on two cores: embedded corpus, tiny model, 40 steps, a checkpoint every 10.

    The code path stays the experiment's own: its order kind, phases, optimizer and model choices are kept.
    """
    model, order, training = config.model, config.order, config.training
    config.data.update(path="", tokenizer="bytes")
    two_stream = min(model.two_stream_layers, 1)
    model.update(max_length=64, num_layers=2, two_stream_layers=two_stream, width=32, num_heads=2, mlp_width=0)
    model.update(positional_width=16, vocab_size=0, num_kv_heads=min(model.num_kv_heads, 1), head_dim=0)
    model.update(learned_positions=65 if model.learned_positions else 0)
    order.update(ar_steps=10, permute_steps=20, max_permuted=min(order.max_permuted, 8))
    order.update(sbp_steps=10 if order.sbp_steps else 0, streams=tuple(s for s in order.streams if 64 % s == 0))
    order.update(max_block=min(order.max_block, 64))
    training.update(num_steps=40, batch_size=8, microbatches=min(training.microbatches, 2), log_every=1)
    training.update(eval_every=20, eval_batches=2, checkpoint_every=10)
    config.optimizer.update(warmup_steps=5, ema_decay=min(config.optimizer.ema_decay, 0.9))
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    return config
