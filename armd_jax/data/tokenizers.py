"""Tokenizers: text to ids and back, from a trained sentencepiece model, vocabulary files, or plain bytes.

All kinds share one surface (`Tokenizer`). A tokenizer is `lossless` when decode(encode(text)) == text for every string,
which is what makes bits per byte of the original text a true number. No text a user writes becomes the end-of-text id:
that id stands between documents only and is put there by the packing.
"""

import abc
import functools
import hashlib
import io
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import tokenizers as library

from armd_jax.config import DataConfig
from armd_jax.errors import UserError, shown

CONFIG_FILE = "tokenizer_config.json"
MODEL_FILE = "tokenizer.model"
LOOKED_FOR = "vocab.json + merges.txt (byte-level BPE), vocab.txt (WordPiece) or one *.model (sentencepiece)"

SPACE_MARK = "\u2581"  # sentencepiece writes a space this way inside its pieces
NEWLINES = ["\n", "\n\n"]  # pieces of their own, so that no word swallows a line end
TRAINING_BYTES = 16 << 20  # more text than this adds time and hardly changes a vocabulary

# Before a space or line end that follows a visible character no piece of our kinds goes on: encoding the two sides
# apart gives the same ids as encoding the whole.
CUT = re.compile(r"(?<=\S)[ \n]")
CHUNK = 1 << 16  # characters
LONGEST_CHUNK = 1 << 20  # characters; text without a cut for so long, such as encoded binary data, is cut anywhere

# What a normalising tokenizer changes: space runs, line ends, case, accents, compatibility forms, rare characters.
PROBE = (
    " \t Two  spaces \n\n\r\n e\u0301 \u00c5\u212b \ufb01 \u2460 \uff21 \u3000 \u200b \u4e2d\U0001f600 \u2581 "
    "</s> [SEP] "
)


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      kind: "sentencepiece", "bytes", "bpe" or "wordpiece".
      vocab_size: number of ids, end-of-text included; ids are 0 .. vocab_size - 1.
      end_of_text: the id put after every document; `encode` never gives it.
      lossless: whether decode(encode(text)) == text for every string.
      hash: sha256 over the kind and the vocabulary files.
    """

    kind: str
    vocab_size: int
    end_of_text: int
    lossless: bool
    hash: str

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, computed on all cores where the library can."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; end-of-text ids are dropped, and bytes that form no character become U+FFFD."""

    @abc.abstractmethod
    def token_text(self, token: int) -> str:
        """A short text for one id, for pictures; part of a character shows as <0x..>."""

    @abc.abstractmethod
    def _files(self) -> dict[str, bytes]:
        """The vocabulary files by name."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end-of-text."""
        return self.encode_batch([text])[0]

    def chunks(self, text: str) -> Iterator[str]:
        """Cuts `text` where the ids of the parts, joined, are the ids of the whole: long texts need no more memory.

        LONGEST_CHUNK characters without such a place are cut all the same: what they decode to does not change.
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
        """Writes what `load` needs into `folder`, which is made where it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {name: getattr(self, name) for name in ("kind", "vocab_size", "end_of_text", "lossless", "hash")}
        for name, content in (self._files() | {CONFIG_FILE: (json.dumps(about, indent=2) + "\n").encode()}).items():
            partial = folder / f".{name}.{secrets.token_hex(4)}"
            partial.write_bytes(content)
            partial.replace(folder / name)  # whole or not at all, and never through a link that was there

    def _hash(self) -> str:
        return hash_files(self.kind, self._files())


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255; 256 is end-of-text."""

    kind, vocab_size, end_of_text, lossless = "bytes", 257, 256, True

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
    """A sentencepiece model. Those trained here are lossless; for others that is found out with a probe text."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = MODEL_FILE) -> None:
        self._model = model
        try:
            if not model:  # which the library takes for no model at all
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
        return [self._encode_marked(text) for text in texts]

    def _encode_marked(self, text: str) -> list[int]:
        first, *rest = self._pieces.encode(text.split(SPACE_MARK))
        return first + [token for part in rest for token in self._mark + part]

    def decode(self, ids: Iterable[int]) -> str:
        return self._pieces.decode([token for token in map(int, ids) if token != self.end_of_text])

    def token_text(self, token: int) -> str:
        piece = self._pieces.id_to_piece(int(token))
        return piece if self._pieces.is_byte(int(token)) else piece.replace(SPACE_MARK, " ")

    def chunks(self, text: str) -> Iterator[str]:
        return super().chunks(text) if self._can_cut else iter([text])

    @functools.cached_property
    def _can_cut(self) -> bool:
        """Whether no piece reaches over a cut (pieces over several words would)."""
        pieces = (self._pieces.id_to_piece(token).replace(SPACE_MARK, " ") for token in range(self.vocab_size))
        return self.lossless and not any(CUT.search(piece) for piece in pieces)

    def _files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self._model}


class VocabularyTokenizer(Tokenizer):
    """Byte-level BPE (GPT-2) or uncased WordPiece (BERT) from vocabulary files, through the `tokenizers` library.

    End-of-text is `<|endoftext|>` or `[SEP]`. No token is matched in the text before the model sees it, so that a
    user's own "<|endoftext|>" is ordinary text.
    """

    def __init__(self, kind: str, files: dict[str, bytes], where: str) -> None:
        self.kind = kind
        self._contents = files
        try:
            self._library, vocab = _byte_level_bpe(files) if kind == "bpe" else _wordpiece(files)
        except Exception as error:  # the library raises bare Exceptions on malformed files
            raise UserError(f"{where}: the vocabulary files cannot be read: {error}") from error
        self.vocab_size = len(vocab)
        if sorted(vocab.values()) != list(range(self.vocab_size)):
            raise UserError(f"{where}: the ids of the vocabulary are not 0 .. {self.vocab_size - 1}")
        end = "<|endoftext|>" if kind == "bpe" else "[SEP]"
        if end not in vocab:
            raise UserError(f"{where}: the vocabulary has no {end}")
        self.end_of_text = vocab[end]
        # With every byte in the vocabulary BPE can spell any text; the WordPiece normaliser drops case and spaces.
        self.lossless = kind == "bpe" and vocab.keys() >= set(library.pre_tokenizers.ByteLevel.alphabet())
        self.hash = self._hash()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._library.decode([token for token in map(int, ids) if token != self.end_of_text])

    def token_text(self, token: int) -> str:
        piece = self._library.id_to_token(int(token))
        if self.kind == "wordpiece" or token == self.end_of_text:
            return piece
        text = self._library.decode([int(token)])
        return text if "\ufffd" not in text else piece

    def _files(self) -> dict[str, bytes]:
        return self._contents


def _byte_level_bpe(files: dict[str, bytes]) -> tuple[library.Tokenizer, dict[str, int]]:
    vocab = json.loads(files["vocab.json"])
    lines = files["merges.txt"].decode().split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    tokenizer = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer, vocab


def _wordpiece(files: dict[str, bytes]) -> tuple[library.Tokenizer, dict[str, int]]:
    lines = files["vocab.txt"].decode().rstrip("\n").split("\n")
    vocab = {line.rstrip("\r"): index for index, line in enumerate(lines)}
    tokenizer = library.Tokenizer(library.models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    return tokenizer, vocab


def hash_files(kind: str, files: dict[str, bytes]) -> str:
    """sha256 over the kind and the files, names included."""
    digest = hashlib.sha256(kind.encode())
    for name, content in sorted(files.items()):
        digest.update(b"\0" + name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer in `folder`: one written by `save`, or plain vocabulary files. Raises UserError where none is."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"data.tokenizer={str(folder)!r}: neither a kind (sentencepiece, bytes) nor a folder")
    kind = _saved_kind(folder)
    models = sorted(folder.glob("*.model"))
    tokenizer: Tokenizer
    try:
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = VocabularyTokenizer("bpe", _read(folder, "vocab.json", "merges.txt"), str(folder))
        elif (folder / "vocab.txt").is_file():
            tokenizer = VocabularyTokenizer("wordpiece", _read(folder, "vocab.txt"), str(folder))
        elif len(models) == 1:
            tokenizer = SentencePieceTokenizer(models[0].read_bytes(), str(models[0]))
        elif kind == "bytes":
            tokenizer = BytesTokenizer()
        else:
            raise UserError(f"{folder} holds no tokenizer; looked for {LOOKED_FOR}")
    except OSError as error:
        raise UserError(f"{folder}: cannot read the tokenizer: {error.strerror}") from error
    if kind is not None and kind != tokenizer.kind:
        raise UserError(f"{folder}: {CONFIG_FILE} says kind {shown(kind)} but the files are {tokenizer.kind!r}")
    return tokenizer


def _read(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def _saved_kind(folder: Path) -> str | None:
    """The kind that `save` noted; None for plain vocabulary files, whose own config of that name knows no kind."""
    try:
        about = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return about.get("kind") if isinstance(about, dict) else None


def request(config: DataConfig) -> str:
    """Names the tokenizer that `config` asks for, before any training: equal requests on equal text give equal ids."""
    if config.tokenizer == "sentencepiece":
        return f"sentencepiece, vocab_size {config.vocab_size}"
    if config.tokenizer == "bytes":
        return "bytes"
    tokenizer = load(config.tokenizer)
    return f"{tokenizer.kind} {tokenizer.hash}"


def create(config: DataConfig, documents: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` asks for; `documents` (the train split) is read only where one is trained."""
    if config.tokenizer == "sentencepiece":
        return train_sentencepiece(documents, config.vocab_size)
    return BytesTokenizer() if config.tokenizer == "bytes" else load(config.tokenizer)


def train_sentencepiece(documents: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a lossless sentencepiece BPE model; the same documents give the same model.

    BPE rather than a unigram model: on the embedded corpus it trains ten times faster and needs fewer tokens a byte.
    Runs of spaces are pieces, which indented text pays for. Where the text has fewer pieces than asked for, the
    vocabulary is smaller than `vocab_size`. Raises UserError where `vocab_size` does not hold the alphabet.
    """
    model = io.BytesIO()
    lines = _sample_lines(documents)
    # Without a piece for it, a space would come back as the mark that stands for it.
    required = {} if any(" " in line for line in lines) else {"required_chars": SPACE_MARK}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=NEWLINES,
            max_sentence_length=1 << 30,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
            **required,
        )
    except RuntimeError as error:
        too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if too_small:
            raise UserError(
                f"data.vocab_size={vocab_size}: the bytes and the alphabet of this text alone need {too_small[1]}"
            ) from error
        raise UserError(f"data.vocab_size={vocab_size}: sentencepiece cannot train on this text: {error}") from error
    return SentencePieceTokenizer(model.getvalue())


def _sample_lines(documents: Iterable[str]) -> list[str]:
    """Lines of the documents, thinned evenly over all of them so that at most TRAINING_BYTES are kept."""
    lines: list[str] = []
    size, every, seen = 0, 1, 0
    for text in documents:
        for line in text.split("\n"):
            for start in range(0, len(line), CHUNK):  # text without line ends must be thinned too
                seen += 1
                if seen % every == 0:
                    lines.append(line[start : start + CHUNK])
                    size += len(lines[-1].encode())
        while size > TRAINING_BYTES and len(lines) > 1:
            every *= 2
            lines = lines[1::2]  # the lines whose number is divisible by the new `every`
            size = sum(len(line.encode()) for line in lines)
    return lines
