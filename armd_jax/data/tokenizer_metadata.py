"""What the files beside a vocabulary say about it: added tokens, special tokens, and the options of its tokenizer.

These are `added_tokens.json`, `special_tokens_map.json` and `tokenizer_config.json`, as Hugging Face `transformers` has
written them over the years. They are read as data: nothing in them names a class or a file that would be loaded.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from armd_jax.errors import UserError, shown

CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
LARGEST_FILE = 1 << 28  # bytes; the largest tokenizer.json in use has about 35 million
_LISTS_OF_SPECIAL_TOKENS = ("additional_special_tokens", "extra_special_tokens")
# Tokens that decide what a text becomes. If two files name different ones, nobody can tell which is meant.
_DECISIVE = ("eos_token", "sep_token", "unk_token")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that was added to a vocabulary.

    Attributes:
      special: it stands for no text: no text that spells it becomes this token.
      lstrip, rstrip: it takes the spaces before it, after it, with it.
      single_word: it is found only where no letter or digit touches it.
      normalized: it is searched for in the text after normalisation.
    """

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True


@dataclasses.dataclass(frozen=True)
class TokenizerMetadata:
    """What the files beside a vocabulary say.

    Attributes:
      folder: where they are.
      tokenizer_class: the class of `transformers` that the vocabulary is for, without "Fast"; empty if none is named.
      named: the tokens that have a role, by the role ("eos_token").
      added: the added tokens, by id.
      options: everything that `tokenizer_config.json` says.
    """

    folder: Path
    tokenizer_class: str
    named: dict[str, str]
    added: tuple[AddedToken, ...]
    options: dict[str, Any]

    def option(self, name: str) -> bool | None:
        """A switch of `tokenizer_config.json`. None if it is not set. Raises UserError if it is no switch."""
        value = self.options.get(name)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{self.folder / CONFIG_FILE}: {name}={shown(value)}: expected true or false")
        return value


def parse_json(content: bytes) -> Any:
    """The value of a JSON file, with or without a byte order mark. Raises UserError without the name of the file."""
    if len(content) > LARGEST_FILE:
        raise UserError(f"has {len(content):,} bytes, more than any vocabulary has ({LARGEST_FILE:,})")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise UserError("cannot be read as JSON: it is nested too deeply") from error
    except ValueError as error:  # neither JSON nor UTF-8
        raise UserError(f"cannot be read as JSON: {error}") from error


def read_metadata(folder: Path) -> TokenizerMetadata:
    """What the files in `folder` say, none of which has to exist.

    Raises UserError if one of them is not what `transformers` writes, or if they contradict one another.
    """
    config, specials = _object(folder, CONFIG_FILE), _object(folder, SPECIAL_TOKENS_FILE)
    first, second = _named(folder / SPECIAL_TOKENS_FILE, specials), _named(folder / CONFIG_FILE, config)
    for role in _DECISIVE:
        if role in first and role in second and first[role] != second[role]:
            raise UserError(
                f"{folder}: {role} is {shown(first[role])} in {SPECIAL_TOKENS_FILE}, but {shown(second[role])} in"
                f" {CONFIG_FILE}; correct one of them"
            )
    named = first | second
    special = {*named.values(), *_listed(specials), *_listed(config)}
    kind = config.get("tokenizer_class")
    return TokenizerMetadata(
        folder=folder,
        tokenizer_class=kind.removesuffix("Fast") if isinstance(kind, str) else "",
        named=named,
        added=_added(folder, config, special),
        options=config,
    )


def added_token(values: Any, number: Any) -> AddedToken:
    """An added token as `transformers` and `tokenizers` write it. Raises UserError if it is none."""
    if isinstance(number, str) and number.isdecimal():
        number = int(number)
    content = values.get("content") if isinstance(values, dict) else values
    if not (isinstance(content, str) and content) or not isinstance(number, int) or number < 0:
        raise UserError(f"{shown(values)} with id {shown(number)} is no added token")
    known = values if isinstance(values, dict) else {}
    flags = [
        flag for flag in ("special", "lstrip", "rstrip", "single_word", "normalized") if known.get(flag) is not None
    ]
    return AddedToken(number, content, **{flag: bool(known[flag]) for flag in flags})


def _object(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    if not (folder / name).is_file():
        return {}
    try:
        value = parse_json((folder / name).read_bytes())
        if not isinstance(value, dict):
            raise UserError("is not a JSON object")
    except UserError as error:
        raise UserError(f"{folder / name}: {error}") from error
    return value


def _content(value: Any) -> str | None:
    """The text of a token that is given as a text or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _named(file: Path, values: dict[str, Any]) -> dict[str, str]:
    """The tokens with a role. Other fields that end in `_token` are switches, such as `add_bos_token`."""
    found: dict[str, str] = {}
    for role, value in values.items():
        if role.endswith("_token") and value is not None and not isinstance(value, bool):
            content = _content(value)
            if content is None:
                raise UserError(f"{file}: {role}={shown(value)}: expected the text of a token")
            found[role] = content
    return found


def _listed(values: dict[str, Any]) -> list[str]:
    """The special tokens that have no role."""
    found: list[str] = []
    for name in _LISTS_OF_SPECIAL_TOKENS:
        tokens = values.get(name) or []
        tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
        if isinstance(tokens, list):
            found += [content for token in tokens if (content := _content(token)) is not None]
    return found


def _added(folder: Path, config: dict[str, Any], special: set[str]) -> tuple[AddedToken, ...]:
    """The added tokens by id. The config tells everything about them, the older file only their ids."""
    found: dict[str, AddedToken] = {}
    decoder, older = config.get("added_tokens_decoder") or {}, _object(folder, ADDED_TOKENS_FILE)
    if not isinstance(decoder, dict):
        raise UserError(f"{folder / CONFIG_FILE}: added_tokens_decoder is not a JSON object")
    try:
        for number, values in decoder.items():
            token = added_token(values, number)
            found[token.content] = token
        for content, number in older.items():
            flags = {"content": content, "special": content in special, "normalized": content not in special}
            token = added_token(flags, number)
            if found.setdefault(content, token).id != token.id:
                raise UserError(f"{shown(content)} has id {token.id}, but {found[content].id} in {CONFIG_FILE}")
    except UserError as error:
        raise UserError(f"{folder}: the added tokens cannot be used: {error}") from error
    return tuple(sorted(found.values(), key=lambda token: token.id))
