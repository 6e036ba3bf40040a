"""Tokenizers: text to ids and back, from a trained sentencepiece model, vocabulary files, or plain bytes.

All kinds share one interface (`Tokenizer`). A tokenizer is `lossless` if decode(encode(text)) == text for every string;
only then are bits per byte of the original text exact. No text that a user writes is ever encoded as the end-of-text
id: that id stands only between documents, where packing puts it.
"""

import abc
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, assert_never

import sentencepiece
import tokenizers as library

from armd_jax import files, typed
from armd_jax.config import DataConfig, is_named_tokenizer
from armd_jax.data.sentencepiece_training import SPACE_MARK, train_model
from armd_jax.errors import UserError, shown
from armd_jax.names import NamedTokenizer, TokenizerKind, VocabularyTokenizerKind

CONFIG_FILE = "tokenizer_config.json"
MODEL_FILE = "tokenizer.model"
VOCABULARY_FILES: dict[VocabularyTokenizerKind, tuple[str, ...]] = {
    "bpe": ("vocab.json", "merges.txt"),
    "wordpiece": ("vocab.txt",),
}

# No piece of our kinds continues over a space or line end that follows a visible character. Text can therefore be cut
# there: encoding the two sides apart gives the same ids as encoding the whole.
CUT = re.compile(r"(?<=\S)[ \n]")
CHUNK = 1 << 16  # characters
LONGEST_CHUNK = 1 << 20  # characters; text that has no cut for this long, such as encoded binary data, is cut anywhere

# What a normalising tokenizer changes: space runs, line ends, case, accents, compatibility forms, rare characters.
PROBE = (
    " \t Two  spaces \n\n\r\n e\u0301 \u00c5\u212b \ufb01 \u2460 \uff21 \u3000 \u200b \u4e2d\U0001f600 \u2581 "
    "</s> [SEP] "
)


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

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, computed on all cores if the library can do that."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. End-of-text ids are dropped, and bytes that form no character become U+FFFD."""

    @abc.abstractmethod
    def token_text(self, token: int) -> str:
        """A short text for one id, for pictures. A byte that is only part of a character is shown as <0x..>."""

    @abc.abstractmethod
    def _files(self) -> dict[str, bytes]:
        """The vocabulary files by name."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end-of-text."""
        return self.encode_batch([text])[0]

    def chunks(self, text: str) -> Iterator[str]:
        """Cuts `text` into parts whose ids, joined, are the ids of the whole. Long texts are encoded part by part.

        If there is no place for such a cut in LONGEST_CHUNK characters, the text is cut there all the same. The ids may
        then differ from those of the whole, but not the text that they decode to.
        """
        start = 0
        while len(text) - start > CHUNK:
            limit = start + LONGEST_CHUNK
            cut = CUT.search(text, start + CHUNK, limit)
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
        return bytes(token for token in map(int, ids) if token != self.end_of_text).decode(errors="replace")

    def token_text(self, token: int) -> str:
        if token == self.end_of_text:
            return "<|endoftext|>"
        return chr(token) if token < 128 else f"<0x{token:02X}>"

    def _files(self) -> dict[str, bytes]:
        return {}


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Those trained here are lossless; for others a probe text finds out whether they are."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = MODEL_FILE) -> None:
        self._model = model
        try:
            if not model:  # the library would take an empty file for an argument that was not given
                raise RuntimeError("empty")
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"{name} is not a sentencepiece model") from error
        self.vocab_size = self._pieces.vocab_size()
        self.end_of_text = self._pieces.eos_id()
        if self.end_of_text < 0:
            raise UserError(f"{name} has no end-of-text piece (eos_id)")
        # The library reads a literal U+2581 as a space. Written as bytes instead, it comes back as itself.
        mark = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark = mark if all(self._pieces.is_byte(token) for token in mark) else None
        self.lossless = self.decode(self.encode(PROBE)) == PROBE
        self.hash = self._hash()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._mark is None or not any(SPACE_MARK in text for text in texts):
            return self._pieces.encode(list(texts))
        return [self._encode_marked(text, self._mark) for text in texts]

    def _encode_marked(self, text: str, mark: list[int]) -> list[int]:
        """The ids of a text that holds U+2581, each of them encoded as the ids `mark` of its bytes."""
        first, *rest = self._pieces.encode(text.split(SPACE_MARK))
        return first + [token for part in rest for token in mark + part]

    def decode(self, ids: Iterable[int]) -> str:
        return self._pieces.decode([token for token in map(int, ids) if token != self.end_of_text])

    def token_text(self, token: int) -> str:
        piece = self._pieces.id_to_piece(int(token))
        return piece if self._pieces.is_byte(int(token)) else piece.replace(SPACE_MARK, " ")

    def chunks(self, text: str) -> Iterator[str]:
        return super().chunks(text) if self._can_cut else iter([text])

    @functools.cached_property
    def _can_cut(self) -> bool:
        """Whether no piece contains a place where `chunks` cuts, as pieces of several words would."""
        pieces = (self._pieces.id_to_piece(token).replace(SPACE_MARK, " ") for token in range(self.vocab_size))
        return self.lossless and not any(CUT.search(piece) for piece in pieces)

    def _files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self._model}


class VocabularyTokenizer(Tokenizer):
    """Byte-level BPE (GPT-2) or uncased WordPiece (BERT) from vocabulary files, through the `tokenizers` library.

    End-of-text is `<|endoftext|>` or `[SEP]`. The library is told of no special tokens, so a user's own
    "<|endoftext|>" is ordinary text.
    """

    def __init__(self, kind: VocabularyTokenizerKind, contents: dict[str, bytes], where: str) -> None:
        """contents: the files of VOCABULARY_FILES[kind]. where: what messages call them."""
        self.kind = kind
        self._contents = contents
        try:
            match kind:
                case "bpe":
                    self._library, vocab = _byte_level_bpe(contents)
                    end = "<|endoftext|>"
                    # With every byte in the vocabulary, BPE can spell any text.
                    lossless = vocab.keys() >= set(library.pre_tokenizers.ByteLevel.alphabet())
                    self._pieces_are_text = False  # but bytes, each written as some printable character
                case "wordpiece":
                    self._library, vocab = _wordpiece(contents)
                    end = "[SEP]"
                    lossless = False  # the normaliser drops case and spaces
                    self._pieces_are_text = True
                case _:
                    assert_never(kind)
        except Exception as error:  # the library raises bare Exceptions on malformed files
            raise UserError(f"{where}: the vocabulary files cannot be read: {error}") from error
        self.vocab_size = len(vocab)
        if sorted(vocab.values()) != list(range(self.vocab_size)):
            raise UserError(f"{where}: the ids of the vocabulary are not 0 .. {self.vocab_size - 1}")
        if end not in vocab:
            raise UserError(f"{where}: the vocabulary has no {end}")
        self.end_of_text = vocab[end]
        self.lossless = lossless
        self.hash = self._hash()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._library.decode([token for token in map(int, ids) if token != self.end_of_text])

    def token_text(self, token: int) -> str:
        piece = self._library.id_to_token(int(token))
        if piece is None:
            raise IndexError(f"id {token} of {self.vocab_size}")
        if self._pieces_are_text or token == self.end_of_text:
            return piece
        text = self._library.decode([int(token)])
        return text if "\ufffd" not in text else piece

    def _files(self) -> dict[str, bytes]:
        return self._contents


def _byte_level_bpe(contents: dict[str, bytes]) -> tuple[library.Tokenizer, dict[str, int]]:
    vocab = json.loads(contents["vocab.json"])
    lines = contents["merges.txt"].decode().split("\n")
    parts = [line.partition(" ") for line in lines if line.strip() and not line.startswith("#version")]
    merges = [(left, right) for left, _, right in parts]
    tokenizer = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer, vocab


def _wordpiece(contents: dict[str, bytes]) -> tuple[library.Tokenizer, dict[str, int]]:
    lines = contents["vocab.txt"].decode().rstrip("\n").split("\n")
    vocab = {line.rstrip("\r"): index for index, line in enumerate(lines)}
    tokenizer = library.Tokenizer(library.models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    return tokenizer, vocab


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
    kind = _kind_in(folder, saved_kind)
    if kind is None:
        raise UserError(
            f"{folder} holds no tokenizer; looked for {' + '.join(VOCABULARY_FILES['bpe'])} (byte-level BPE),"
            f" {' + '.join(VOCABULARY_FILES['wordpiece'])} (WordPiece) or one *.model (sentencepiece)"
        )
    try:
        tokenizer = _load_kind(kind, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot read the tokenizer: {error.strerror}") from error
    if saved_kind is not None and saved_kind != tokenizer.kind:
        raise UserError(f"{folder}: {CONFIG_FILE} says kind {shown(saved_kind)} but the files are {tokenizer.kind!r}")
    return tokenizer


def _saved_kind(folder: Path) -> Any:
    """The kind that `save` noted. None for plain vocabulary files, whose own config of that name gives no kind."""
    try:
        about = files.read_json(folder / CONFIG_FILE)
    except UserError:
        return None
    return about.get("kind") if isinstance(about, dict) else None


def _kind_in(folder: Path, saved_kind: Any) -> TokenizerKind | None:
    """The kind of tokenizer that the files in `folder` are for."""
    for kind, names in VOCABULARY_FILES.items():
        if all((folder / name).is_file() for name in names):
            return kind
    if len(list(folder.glob("*.model"))) == 1:
        return "sentencepiece"
    # Bytes need no vocabulary file. Only what `save` noted tells of them.
    match saved_kind:
        case "bytes":
            return "bytes"
        case _:
            return None


def _load_kind(kind: TokenizerKind, folder: Path) -> Tokenizer:
    match kind:
        case "sentencepiece":
            (model,) = folder.glob("*.model")
            return SentencePieceTokenizer(model.read_bytes(), str(model))
        case "bytes":
            return BytesTokenizer()
        case "bpe" | "wordpiece":
            contents = {name: (folder / name).read_bytes() for name in VOCABULARY_FILES[kind]}
            return VocabularyTokenizer(kind, contents, str(folder))
        case _:
            assert_never(kind)


def request_of(config: DataConfig) -> str:
    """A text for the tokenizer that `config` asks for, known before any training.

    Equal requests on equal training documents give equal tokenizers. Raises UserError if a folder is asked for that
    holds no tokenizer.
    """
    if not is_named_tokenizer(config.tokenizer):
        tokenizer = load(Path(config.tokenizer))
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
        return load(Path(config.tokenizer))
    match config.tokenizer:
        case "sentencepiece":
            return None
        case "bytes":
            return BytesTokenizer()
        case _:
            assert_never(config.tokenizer)


def load_or_train(config: DataConfig, documents: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` asks for.

    documents: the train split. They are read only if a tokenizer is trained.
    """
    return ready_made(config) or SentencePieceTokenizer(train_model(documents, config.vocab_size))
