"""Tokenizers: text to ids and back, from a trained sentencepiece model, vocabulary files, or plain bytes.

All kinds share one interface (`Tokenizer`). A tokenizer is `lossless` if decode(encode(text)) == text for every string;
only then are bits per byte of the original text exact. No text that a user writes is ever encoded as the end-of-text
id: that id stands only between documents, where packing puts it.
"""

import abc
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, assert_never

import sentencepiece

from armd_jax import files, remote, typed
from armd_jax.data.sentencepiece_training import SPACE_MARK, Note, train_model
from armd_jax.data.tokenizer_metadata import CONFIG_FILE, parse_json
from armd_jax.data.vocabulary_building import CUT, build
from armd_jax.data.vocabulary_folders import VOCABULARY_FILES, read_saved, read_vocabulary, settings_file
from armd_jax.data.vocabulary_settings import MODEL_FILE, PLAIN, Settings, Vocabulary
from armd_jax.data_config import DataConfig, is_named_tokenizer
from armd_jax.errors import UserError, shown
from armd_jax.names import NamedTokenizer, TokenizerKind, VocabularyTokenizerKind

CHUNK = 1 << 16  # characters
LONGEST_CHUNK = 1 << 20  # characters; text that has no cut for this long, such as encoded binary data, is cut anywhere

# What a normalising tokenizer changes: space runs, line ends, case, accents, compatibility forms, rare characters.
PROBE = (
    " \t Two  spaces \n\n\r\n e\u0301 \u00c5\u212b \ufb01 \u2460 \uff21 \u3000 \u200b \u4e2d\U0001f600 \u2581 "
    "</s> [SEP] "
)
# Characters whose UTF-8 has every byte that occurs in text.
EVERY_BYTE = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x200), *range(0xE000, 0x110000, 0x1000))))


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      kind: how it works.
      vocab_size: number of ids, end-of-text included; ids are 0 .. vocab_size - 1.
      end_of_text: the id put after every document; `encode` never gives it.
      lossless: whether decode(encode(text)) == text for every string.
      hash: sha256 over the kind and the vocabulary files.
    """

    kind: TokenizerKind
    vocab_size: int
    end_of_text: int
    lossless: bool
    hash: str
    _cut: re.Pattern[str] | None = CUT  # where `chunks` may cut; None: nowhere

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, computed on all cores if the library can do that."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Those without text are dropped, and bytes that form no character become U+FFFD."""

    @abc.abstractmethod
    def token_text(self, token: int) -> str:
        """A short text for one id, for pictures: <0x..> for a byte that is part of a character, <id> for no token."""

    @abc.abstractmethod
    def _files(self) -> dict[str, bytes]:
        """The vocabulary files by name."""

    def _tokens(self, ids: Iterable[int]) -> list[int]:
        """`ids` without end-of-text, and without those behind the last token, which a padded embedding may have."""
        return [token for token in map(int, ids) if token != self.end_of_text and token < self.vocab_size]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end-of-text."""
        return self.encode_batch([text])[0]

    def chunks(self, text: str) -> Iterator[str]:
        """Cuts `text` into parts whose ids, joined, are the ids of the whole. Long texts are encoded part by part.

        If there is no place for such a cut in LONGEST_CHUNK characters, the text is cut there all the same. The ids may
        then differ from those of the whole, but not the text that they decode to.
        """
        start, places = 0, self._cut
        while places is not None and len(text) - start > CHUNK:
            limit = start + LONGEST_CHUNK
            cut = places.search(text, start + CHUNK, limit)
            if cut is None and limit >= len(text):
                break
            end = cut.start() if cut else limit
            yield text[start:end]
            start = end
        yield text[start:]

    def save(self, folder: Path) -> None:
        """Writes what `load` needs into `folder`, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {name: getattr(self, name) for name in ("kind", "vocab_size", "end_of_text", "lossless", "hash")}
        for name, content in self._files().items():
            files.write(folder / name, content)
        files.write(folder / CONFIG_FILE, typed.to_json(about, indent=2) + "\n")

    def _hash(self) -> str:
        digest = hashlib.sha256(self.kind.encode())
        for name, content in sorted(self._files().items()):
            digest.update(b"\0" + name.encode() + b"\0" + hashlib.sha256(content).digest())
        return digest.hexdigest()


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255; 256 is end-of-text."""

    kind = "bytes"
    vocab_size = 257
    end_of_text = 256
    lossless = True

    def __init__(self) -> None:
        self.hash = self._hash()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(self._tokens(ids)).decode(errors="replace")

    def token_text(self, token: int) -> str:
        if token == self.end_of_text:
            return "<|endoftext|>"
        return chr(token) if token < 128 else f"<0x{token:02X}>" if token < self.vocab_size else f"<{token}>"

    def _files(self) -> dict[str, bytes]:
        return {}


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Those trained here are lossless; for others a probe text finds out whether they are.

    Special tokens that were added after its training have the ids behind its pieces.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = MODEL_FILE, settings: Settings = PLAIN) -> None:
        """name: what messages call the model. settings: with an end-of-text of its own and added tokens, if any."""
        self._model, self._settings = model, settings
        try:
            if not model:  # the library would take an empty file for an argument that was not given
                raise RuntimeError("empty")
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{name} is not a sentencepiece model (for one of tiktoken, give the tokenizer.json of its tokenizer)"
            ) from error
        self._num_pieces = self._pieces.vocab_size()
        self._added = [token.content for token in settings.added]
        self.vocab_size = self._num_pieces + len(self._added)
        if [token.id for token in settings.added] != list(range(self._num_pieces, self.vocab_size)):
            raise UserError(f"{name}: the ids of the added tokens do not follow its {self._num_pieces} pieces")
        self.end_of_text = self._end_of_text(settings.end_of_text)
        if self.end_of_text < 0:
            raise UserError(f"{name} has no {settings.end_of_text or 'piece (eos_id)'} as its end-of-text")
        # The library reads a literal U+2581 as a space. Written as bytes instead, it comes back as itself.
        mark = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark = mark if all(self._pieces.is_byte(token) for token in mark) else None
        self.lossless = self.decode(self.encode(PROBE)) == PROBE
        self.hash = self._hash()

    def _end_of_text(self, wanted: str) -> int:
        """The id of the end-of-text, -1 if there is none. A piece that text may become is none."""
        if not wanted:
            return self._pieces.eos_id()
        if wanted in self._added:
            return self._num_pieces + self._added.index(wanted)
        token = self._pieces.piece_to_id(wanted)
        return token if self._pieces.is_control(token) else -1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._mark is None or not any(SPACE_MARK in text for text in texts):
            return self._pieces.encode(list(texts))
        return [self._encode_marked(text, self._mark) for text in texts]

    def _encode_marked(self, text: str, mark: list[int]) -> list[int]:
        """The ids of a text that holds U+2581, each of them encoded as the ids `mark` of its bytes."""
        first, *rest = self._pieces.encode(text.split(SPACE_MARK))
        return first + [token for part in rest for token in mark + part]

    def decode(self, ids: Iterable[int]) -> str:
        kept = self._tokens(ids)
        if all(token < self._num_pieces for token in kept):
            return self._pieces.decode(kept)
        parts: list[str] = []
        pieces: list[int] = []
        for token in kept:
            if token < self._num_pieces:
                pieces.append(token)
            else:
                parts += [self._pieces.decode(pieces), self._added[token - self._num_pieces]]
                pieces = []
        return "".join([*parts, self._pieces.decode(pieces)])

    def token_text(self, token: int) -> str:
        if token >= self._num_pieces:
            return self._added[token - self._num_pieces] if token < self.vocab_size else f"<{token}>"
        piece = self._pieces.id_to_piece(int(token))
        return piece if self._pieces.is_byte(int(token)) else piece.replace(SPACE_MARK, " ")

    def chunks(self, text: str) -> Iterator[str]:
        return super().chunks(text) if self._can_cut else iter([text])

    @functools.cached_property
    def _can_cut(self) -> bool:
        """Whether no piece contains a place where `chunks` cuts, as pieces of several words would."""
        pieces = (self._pieces.id_to_piece(token).replace(SPACE_MARK, " ") for token in range(self._num_pieces))
        return self.lossless and not any(CUT.search(piece) for piece in pieces)

    def _files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self._model} | settings_file(self._settings)


class VocabularyTokenizer(Tokenizer):
    """Byte-level BPE (GPT-2), WordPiece (BERT), or any tokenizer.json, through the `tokenizers` library.

    End-of-text is what the files beside the vocabulary name, and else `<|endoftext|>` or `[SEP]`. The library is told
    to take special tokens in text for ordinary text, so a user's own "<|endoftext|>" is that.
    """

    def __init__(
        self, kind: VocabularyTokenizerKind, contents: dict[str, bytes], where: str, settings: Settings = PLAIN
    ) -> None:
        """contents: the files of VOCABULARY_FILES[kind]. where: what messages call them."""
        self.kind = kind
        self._contents, self._settings = contents, settings
        try:
            built = build(kind, contents, settings)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            # The library raises bare Exceptions on malformed files, and its panics are not even that.
            raise UserError(f"{where}: the vocabulary files cannot be read: {error}") from error
        self._library, self._cut, self._pieces_are_text = built.tokenizer, built.cut, built.pieces_are_text
        self.vocab_size = len(built.vocab)
        if sorted(built.vocab.values()) != list(range(self.vocab_size)):
            raise UserError(f"{where}: the ids of the vocabulary are not 0 .. {self.vocab_size - 1}")
        if built.end not in built.vocab:
            raise UserError(
                f"{where}: the vocabulary has no {built.end}; if another token is its end-of-text, name it in"
                ' special_tokens_map.json: {"eos_token": "..."}'
            )
        self.end_of_text = built.vocab[built.end]
        unknown = getattr(built.tokenizer.model, "unk_token", None)
        letters = [built.vocab.get(letter) for letter in built.end] if unknown != built.end else []
        self._end_spelled = [token for token in letters if token is not None and token != self.end_of_text]
        try:
            self.lossless = self._gives_back_a_probe() if built.lossless is None else built.lossless
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # such as a model that needs a token for unknown characters, and has none
            raise UserError(f"{where}: its tokenizer cannot encode every text: {error}") from error
        self.hash = self._hash()

    def _gives_back_a_probe(self) -> bool:
        """Whether a text with every byte, and with whatever the vocabulary treats in its own way, comes back."""
        own = self._library.get_added_tokens_decoder().values()
        probe = PROBE + EVERY_BYTE + "".join(f" {token.content} a{token.content}b" for token in own)
        return self.decode(self.encode(probe)) == probe and self.decode(self.encode("a")) == "a"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._without_end(encoding.ids) for encoding in encoded]

    def _without_end(self, ids: list[int]) -> list[int]:
        """`ids`, with the letters of the end-of-text instead of the token itself.

        The models of some files, such as those of T5, take a text that spells it for that very piece.
        """
        if self.end_of_text not in ids:
            return ids
        return [part for token in ids for part in (self._end_spelled if token == self.end_of_text else [token])]

    def decode(self, ids: Iterable[int]) -> str:
        return self._library.decode(self._tokens(ids), skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        piece = self._library.id_to_token(int(token))
        if piece is None:
            return f"<{token}>"
        if self._pieces_are_text or token == self.end_of_text:
            return piece.replace(SPACE_MARK, " ")
        text = self._library.decode([int(token)], skip_special_tokens=False)
        return text if "\ufffd" not in text else piece

    def _files(self) -> dict[str, bytes]:
        return self._contents | settings_file(self._settings)


# From a folder, and for a config


def load(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`: what `save` wrote, or plain vocabulary files. Raises UserError if there is none.

    Runs, exports and prepared folders, which have theirs in `tokenizer/`, stand for it.
    """
    if (folder / "tokenizer" / CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).exists():
        folder = folder / "tokenizer"
    if not folder.is_dir():
        kinds = ", ".join(typed.choices(NamedTokenizer))
        raise UserError(f"data.tokenizer={str(folder)!r}: neither a kind ({kinds}) nor a folder")
    saved_kind = _saved_kind(folder)
    try:
        vocabulary = read_vocabulary(folder) if saved_kind is None else read_saved(folder)
        tokenizer = _made_of(vocabulary, saved_kind)
    except OSError as error:
        raise UserError(f"{folder}: cannot read the tokenizer: {error.strerror}") from error
    if tokenizer is None:
        raise UserError(
            f"{folder} holds no tokenizer; looked for tokenizer.json, {' + '.join(VOCABULARY_FILES['bpe'])} (byte-level"
            f" BPE), {' + '.join(VOCABULARY_FILES['wordpiece'])} (WordPiece) or one *.model (sentencepiece)"
        )
    if saved_kind is not None and saved_kind != tokenizer.kind:
        raise UserError(f"{folder}: {CONFIG_FILE} says kind {shown(saved_kind)} but the files are {tokenizer.kind!r}")
    return tokenizer


def _saved_kind(folder: Path) -> Any:
    """The kind that `save` noted. None for plain vocabulary files, whose own config of that name gives no kind."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        about = parse_json(file.read_bytes())
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return about.get("kind") if isinstance(about, dict) else None


def _made_of(vocabulary: Vocabulary | None, saved_kind: Any) -> Tokenizer | None:
    """The tokenizer of vocabulary files. None if there are none and none are needed to know it."""
    if vocabulary is None:
        # Bytes need no vocabulary file. Only what `save` noted tells of them.
        match saved_kind:
            case "bytes":
                return BytesTokenizer()
            case _:
                return None
    match vocabulary.kind:
        case "sentencepiece":
            return SentencePieceTokenizer(vocabulary.files[MODEL_FILE], vocabulary.name, vocabulary.settings)
        case "bpe" | "wordpiece" | "tokenizer_json":
            return VocabularyTokenizer(vocabulary.kind, vocabulary.files, vocabulary.name, vocabulary.settings)
        case _:
            assert_never(vocabulary.kind)


def request_of(config: DataConfig) -> str:
    """A text for the tokenizer that `config` asks for, known before any training.

    Equal requests on equal training documents give equal tokenizers. Raises UserError if a folder is asked for that
    holds no tokenizer.
    """
    if not is_named_tokenizer(config.tokenizer):
        tokenizer = load(remote.local(config.tokenizer))
        return f"{tokenizer.kind} {tokenizer.hash}"
    match config.tokenizer:
        case "sentencepiece":
            return f"sentencepiece, vocab_size {config.vocab_size}"
        case "bytes":
            return "bytes"
        case _:
            assert_never(config.tokenizer)


def ready_made(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that `config` asks for; None if it has to be trained first.

    Raises UserError if a folder is asked for that holds no tokenizer.
    """
    if not is_named_tokenizer(config.tokenizer):
        return load(remote.local(config.tokenizer))
    match config.tokenizer:
        case "sentencepiece":
            return None
        case "bytes":
            return BytesTokenizer()
        case _:
            assert_never(config.tokenizer)


def load_or_train(config: DataConfig, documents: Iterable[str], note: Note | None = None) -> Tokenizer:
    """The tokenizer that `config` asks for.

    documents: the train split. They are read only if a tokenizer is trained; `note` is then told on what.
    """
    return ready_made(config) or SentencePieceTokenizer(train_model(documents, config.vocab_size, note))
