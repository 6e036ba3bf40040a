"""`tokenizer.json`, the one file of every newer tokenizer, what stands beside it, and older forms that say the same.

It holds the whole tokenizer except for one thing that a language model needs: which token is the end of a text.
"""

import dataclasses
from typing import Any, assert_never

from armd_jax.data.tokenizer_metadata import AddedToken, TokenizerMetadata, added_token
from armd_jax.data.vocabulary_settings import Settings, Vocabulary, bpe_vocabulary, merges_of, wordpiece_vocabulary
from armd_jax.errors import UserError, shown

# What vocabularies call their end-of-text, if nothing beside the file names it. An end of a turn is none.
_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


def json_settings(value: dict[str, Any], metadata: TokenizerMetadata) -> Settings:
    """The settings of a tokenizer.json. Raises UserError if what stands beside it contradicts it."""
    own = {token.content: token for token in _own_added(value)}
    vocab = value["model"].get("vocab")
    rows = vocab if isinstance(vocab, list) else []  # a unigram model has rows of a piece and its score
    known = {
        *own,
        *(vocab if isinstance(vocab, dict) else ()),
        *(str(row[0]) for row in rows if isinstance(row, list) and row),
    }
    for token in metadata.added:
        if token.content in own and own[token.content].id != token.id:
            raise UserError(f"token {shown(token.content)} has id {own[token.content].id}, but {token.id} beside it")
    end = _json_end(known, metadata)
    extra = [token for token in metadata.added if token.content not in own]
    extra = [dataclasses.replace(token, special=token.special or token.content == end) for token in extra]
    _check_options(value, metadata)
    return Settings(
        end_of_text=end,
        added=tuple(token for token in extra if not token.special or token.content not in known),
    )


def _own_added(value: dict[str, Any]) -> list[AddedToken]:
    tokens = value.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise UserError("added_tokens is not a list of JSON objects")
    return [added_token(token, token.get("id")) for token in tokens]


def _json_end(known: set[str], metadata: TokenizerMetadata) -> str:
    """The end-of-text token. A tokenizer.json does not name it: the files beside it do, or its name is a usual one."""
    if end := metadata.named.get("eos_token"):
        return end
    usual = [end for end in _ENDS if end in known]
    if len(usual) > 1:
        raise UserError(
            f"several of its tokens may be end-of-text: {', '.join(usual)}; name one in special_tokens_map.json beside"
            f' it, such as {{"eos_token": "{usual[0]}"}}'
        )
    separator = metadata.named.get("sep_token", "[SEP]")
    if not usual and separator not in known:
        raise UserError(
            "none of its tokens is known as end-of-text; name it in special_tokens_map.json beside it:"
            ' {"eos_token": "..."}'
        )
    return usual[0] if usual else separator


def parts_of(component: Any) -> list[dict[str, Any]]:
    """The steps of a normaliser, pre-tokenizer or decoder of a tokenizer.json, one after the other."""
    if not isinstance(component, dict):
        return []
    inner = component.get("normalizers") or component.get("pretokenizers") or component.get("decoders")
    return [step for part in inner for step in parts_of(part)] if isinstance(inner, list) else [component]


def _check_options(value: dict[str, Any], metadata: TokenizerMetadata) -> None:
    """Raises UserError if the options of the config are not those of the tokenizer.json, and both are given."""
    names = {
        "ByteLevel": {"add_prefix_space": "add_prefix_space"},
        "BertNormalizer": {
            "do_lower_case": "lowercase",
            "strip_accents": "strip_accents",
            "tokenize_chinese_chars": "handle_chinese_chars",
        },
    }
    for part in [*parts_of(value.get("normalizer")), *parts_of(value.get("pre_tokenizer"))]:
        for option, field in names.get(str(part.get("type")), {}).items():
            wanted = metadata.option(option)
            if wanted is not None and part.get(field) is not None and wanted != part[field]:
                raise UserError(
                    f"{option} is {str(wanted).lower()} in tokenizer_config.json beside it, but not in it; correct one"
                )


def says_the_same(value: dict[str, Any], older: Vocabulary) -> bool:
    """Whether a tokenizer.json gives the tokens of the older form beside it."""
    match older.kind:
        case "bpe":
            return _same_bpe(value, older)
        case "wordpiece":
            return _same_wordpiece(value, older)
        case "sentencepiece":
            return not _found_in_text(value, older.settings)
        case "tokenizer_json":
            return False
        case _:
            assert_never(older.kind)


def _found_in_text(value: dict[str, Any], settings: Settings) -> set[str]:
    """The added tokens of a tokenizer.json that stand for text."""
    return {token.content for token in _own_added(value) if not token.special and token.content != settings.end_of_text}


def _same_bpe(value: dict[str, Any], older: Vocabulary) -> bool:
    model, settings, vocab = value["model"], older.settings, bpe_vocabulary(older.files)
    match settings.splitting:
        case "gpt2":
            words = [("ByteLevel", settings.prefix_space, True)]
        case "qwen2":
            return False
        case _:
            assert_never(settings.splitting)
    steps = parts_of(value.get("pre_tokenizer"))
    off = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return (
        model.get("vocab") == vocab
        and _merges(model.get("merges")) == merges_of(older.files["merges.txt"])
        and not any(model.get(name) for name in (*off, "byte_fallback", "fuse_unk", "ignore_merges"))
        and not parts_of(value.get("normalizer"))
        and [(step.get("type"), step.get("add_prefix_space"), step.get("use_regex", True)) for step in steps] == words
        and _found_in_text(value, settings) == {token.content for token in settings.added if not token.special}
        and {token.content: token.id for token in _own_added(value) if token.content not in vocab}
        == {token.content: token.id for token in settings.added if token.content not in vocab}
    )


def _same_wordpiece(value: dict[str, Any], older: Vocabulary) -> bool:
    model, settings = value["model"], older.settings
    normalizer, words = parts_of(value.get("normalizer")), parts_of(value.get("pre_tokenizer"))
    asked = ("BertNormalizer", True, settings.separate_chinese, settings.strip_accents, settings.lower_case)
    fields = ("type", "clean_text", "handle_chinese_chars", "strip_accents", "lowercase")
    return (
        model.get("vocab") == wordpiece_vocabulary(older.files)
        and model.get("unk_token") == settings.unknown
        and [tuple(map(step.get, fields)) for step in normalizer] == [asked]
        and [step.get("type") for step in words] == ["BertPreTokenizer"]
        and not settings.added
        and not _found_in_text(value, settings)
    )


def _merges(value: Any) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, which writes them as "a b" or as ["a", "b"]."""
    rows = value if isinstance(value, list) else []
    pairs = [row.split(" ") if isinstance(row, str) else row for row in rows]
    return [(str(pair[0]), str(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) == 2]
