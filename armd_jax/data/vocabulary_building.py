"""Tokenizers of the `tokenizers` library, built from vocabulary files and what the files beside them say.

The library is told that special tokens in text are ordinary text, and it neither truncates nor pads.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Any, assert_never

import tokenizers as library

from armd_jax.data.tokenizer_json import parts_of
from armd_jax.data.tokenizer_metadata import AddedToken, added_token, parse_json
from armd_jax.data.vocabulary_settings import JSON_FILE, Settings, merges_of, wordpiece_vocabulary
from armd_jax.errors import UserError, shown
from armd_jax.names import VocabularyTokenizerKind

# No piece continues over a space or line end that follows a visible character. Text can therefore be cut there:
# encoding the two sides apart gives the same ids as encoding the whole.
CUT = re.compile(r"(?<=\S)[ \n]")
# Some tokenizers put line ends into one piece with the punctuation before them, or a space before what is no space.
CUT_AT_SPACE = re.compile(r"(?<=\S) ")

# How Qwen2 cuts text into words. Llama 3 and others take up to three digits at a time.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}| ?", r"|\p{N}{1,3}| ?")


@dataclasses.dataclass(frozen=True)
class Built:
    """A tokenizer of the library and what has to be known about it.

    Attributes:
      vocab: the ids of all tokens, added ones included.
      end: the end-of-text token.
      pieces_are_text: whether its pieces are text, and not bytes that are each written as some printable character.
      cut: the places where text may be cut; None: nowhere.
      lossless: whether it gives back every text; None: a probe has to find out.
    """

    tokenizer: library.Tokenizer
    vocab: dict[str, int]
    end: str
    pieces_are_text: bool
    cut: re.Pattern[str] | None
    lossless: bool | None


def build(kind: VocabularyTokenizerKind, files: dict[str, bytes], settings: Settings) -> Built:
    """The tokenizer of the files. Raises UserError, or whatever the library raises, if they cannot be read."""
    match kind:
        case "bpe":
            return _byte_level_bpe(files, settings)
        case "wordpiece":
            return _wordpiece(files, settings)
        case "tokenizer_json":
            return _from_json(files, settings)
        case _:
            assert_never(kind)


def _byte_level_bpe(files: dict[str, bytes], settings: Settings) -> Built:
    vocab, prefix = parse_json(files["vocab.json"]), settings.prefix_space
    if not isinstance(vocab, dict):  # the library would take a text for the name of a file
        raise UserError("vocab.json is not a JSON object")
    tokenizer = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges_of(files["merges.txt"])))
    # With every byte in the vocabulary, BPE can spell any text.
    lossless: bool | None = vocab.keys() >= set(library.pre_tokenizers.ByteLevel.alphabet())
    cut = CUT_AT_SPACE if prefix else CUT
    match settings.splitting:
        case "gpt2":
            tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        case "qwen2":
            tokenizer.normalizer = library.normalizers.NFC()
            words = library.pre_tokenizers.Split(library.Regex(QWEN2_WORDS), behavior="isolated")
            in_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
            tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([words, in_bytes])
            cut = CUT_AT_SPACE
        case _:
            assert_never(settings.splitting)
    tokenizer.decoder = library.decoders.ByteLevel()
    if lossless and settings != Settings(end_of_text=settings.end_of_text):
        lossless = None
    vocab = _add(tokenizer, vocab, settings.added)
    return Built(
        tokenizer, vocab, settings.end_of_text or "<|endoftext|>", False, _unless_in(settings.added, cut), lossless
    )


def _wordpiece(files: dict[str, bytes], settings: Settings) -> Built:
    files["vocab.txt"].decode()  # raises an error if it is not UTF-8
    vocab = wordpiece_vocabulary(files)
    if settings.unknown not in vocab:
        raise UserError(f"the vocabulary has no {settings.unknown}, which stands for unknown words")
    tokenizer = library.Tokenizer(library.models.WordPiece(vocab=vocab, unk_token=settings.unknown))
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        handle_chinese_chars=settings.separate_chinese,
        strip_accents=settings.strip_accents,
        lowercase=settings.lower_case,
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    vocab = _add(tokenizer, vocab, settings.added)
    # It is never lossless: spaces are gone after the pre-tokenizer.
    return Built(tokenizer, vocab, settings.end_of_text or "[SEP]", True, _unless_in(settings.added, CUT), False)


def _from_json(files: dict[str, bytes], settings: Settings) -> Built:
    value = parse_json(files[JSON_FILE])
    # Documents are neither truncated nor padded, no tokens are put around them, and equal texts give equal tokens.
    value |= {"truncation": None, "padding": None, "post_processor": None}
    value["model"] |= {"dropout": None} if "dropout" in value["model"] else {}
    added = value.get("added_tokens") or []
    for token in added:
        token["special"] = bool(token.get("special")) or token.get("content") == settings.end_of_text
    # What is read here is only data: the library builds its own components, and their names are a closed set.
    tokenizer = library.Tokenizer.from_str(json.dumps(value))
    tokenizer.encode_special_tokens = True
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    for token in added:
        if vocab.get(token["content"]) != token["id"]:
            raise UserError(f"token {shown(token['content'])} cannot have the id {shown(token['id'])}")
    vocab = _add(tokenizer, vocab, settings.added)
    in_text = [added_token(token, token["id"]) for token in added if not token["special"]]
    in_bytes = [part for part in parts_of(value.get("decoder")) if part.get("type") == "ByteLevel"]
    cut = _unless_in([*in_text, *settings.added], _cut_of(value))
    return Built(tokenizer, vocab, settings.end_of_text, not in_bytes, cut, None)


def _cut_of(value: dict[str, Any]) -> re.Pattern[str] | None:
    """Where the text for a tokenizer.json may be cut. None if its way to cut text into words is not known."""
    normalizers = [part.get("type") for part in parts_of(value.get("normalizer"))]
    match parts_of(value.get("pre_tokenizer")):
        case [{"type": "ByteLevel"} as words] if normalizers in ([], ["NFC"]) and words.get("use_regex", True):
            return CUT_AT_SPACE if words.get("add_prefix_space", True) else CUT
        case [{"type": "Digits"}, {"type": "ByteLevel", "add_prefix_space": False} as words]:
            return CUT if normalizers in ([], ["NFC"]) and words.get("use_regex", True) else None
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}, {"type": "ByteLevel"} as rest]:
            known = (
                normalizers in ([], ["NFC"])
                and regex in (QWEN2_WORDS, LLAMA3_WORDS)
                and not rest.get("use_regex", True)
            )
            return CUT_AT_SPACE if known and not rest.get("add_prefix_space", True) else None
        case [{"type": "BertPreTokenizer"}] if normalizers in ([], ["BertNormalizer"]):
            return CUT
        case _:
            return None


def _unless_in(added: Iterable[AddedToken], cut: re.Pattern[str] | None) -> re.Pattern[str] | None:
    """`cut`, or None if an added token that is found in text may lie across such a place."""
    in_text = [token for token in added if not token.special]
    across = [token for token in in_text if token.lstrip or token.rstrip or token.single_word]
    return None if across or any(CUT.search(token.content) for token in in_text) else cut


def _add(tokenizer: library.Tokenizer, vocab: dict[str, int], added: Iterable[AddedToken]) -> dict[str, int]:
    """Adds tokens to a tokenizer and gives the ids of all. Raises UserError if a token cannot have its id."""
    for token in added:
        flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        one = library.AddedToken(token.content, **flags)
        if token.special:
            tokenizer.add_special_tokens([one])
        else:
            tokenizer.add_tokens([one])
        if tokenizer.token_to_id(token.content) != token.id:
            raise UserError(
                f"the added token {shown(token.content)} has id {token.id}, but"
                f" {tokenizer.token_to_id(token.content)} follows from the vocabulary"
            )
    tokenizer.encode_special_tokens = True
    return vocab | {token.content: token.id for token in added}
