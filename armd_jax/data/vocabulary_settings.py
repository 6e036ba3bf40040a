"""What decides the tokens of a vocabulary beside its own files, and what the metadata say about it.

Metadata either become `Settings` or are a reason to refuse the vocabulary, because a tokenizer that ignores them would
give other tokens without a word. The settings of a plain vocabulary are the defaults. They are neither hashed nor
stored, so that what was prepared before they existed keeps its hash.
"""

import dataclasses
from typing import Literal, assert_never

import sentencepiece

from armd_jax.data.sentencepiece_training import SPACE_MARK
from armd_jax.data.tokenizer_metadata import AddedToken, TokenizerMetadata, parse_json
from armd_jax.errors import UserError, shown
from armd_jax.names import VocabularyTokenizerKind

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"

Splitting = Literal["gpt2", "qwen2"]  # how byte-level BPE cuts text into words
FolderKind = Literal[VocabularyTokenizerKind, "sentencepiece"]

# The classes of `transformers` that each older form can be read for, and their own end-of-text.
_BPE_CLASSES: dict[str, tuple[Splitting, str]] = {
    **dict.fromkeys(("", "GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer"), ("gpt2", "<|endoftext|>")),
    **dict.fromkeys(("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer"), ("gpt2", "</s>")),
    "Qwen2Tokenizer": ("qwen2", "<|endoftext|>"),
}
_WORDPIECE_CLASSES = {"", "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"}
_WORDPIECE_CLASSES |= {"ConvBertTokenizer", "LayoutLMTokenizer", "LxmertTokenizer", "SqueezeBertTokenizer"}
_SENTENCEPIECE_CLASSES = {"", "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "T5Tokenizer", "MT5Tokenizer"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the tokens of a vocabulary beside its own files. The defaults are those of a plain vocabulary.

    Attributes:
      end_of_text: the token that stands between documents; empty: the kind's own.
      unknown: WordPiece: the token for words that it cannot spell.
      added: tokens that are not in the vocabulary files, or that are found in text before it is cut into words.
      splitting: byte-level BPE: how text is cut into words.
      prefix_space: byte-level BPE: whether a space is put before every text.
      lower_case, strip_accents, separate_chinese: WordPiece. strip_accents=None: if the text is put into lower case.
    """

    end_of_text: str = ""
    unknown: str = "[UNK]"
    added: tuple[AddedToken, ...] = ()
    splitting: Splitting = "gpt2"
    prefix_space: bool = False
    lower_case: bool = True
    strip_accents: bool | None = None
    separate_chinese: bool = True


PLAIN = Settings()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The files that make a tokenizer, and the settings that belong to them.

    Attributes:
      files: by the names that `Tokenizer.save` gives them.
      name: what messages call them.
    """

    kind: FolderKind
    files: dict[str, bytes]
    name: str
    settings: Settings = PLAIN


def with_settings(vocabulary: Vocabulary, metadata: TokenizerMetadata) -> Vocabulary:
    """An older form with what the metadata say. Raises UserError if they say something that is not supported."""
    match vocabulary.kind:
        case "bpe":
            settings = _bpe_settings(vocabulary.files, metadata)
        case "wordpiece":
            settings = _wordpiece_settings(vocabulary.files, metadata)
        case "sentencepiece":
            settings = _sentencepiece_settings(vocabulary.files[MODEL_FILE], metadata)
        case "tokenizer_json":
            raise AssertionError("it is no older form")
        case _:
            assert_never(vocabulary.kind)
    return dataclasses.replace(vocabulary, settings=settings)


def _refused(metadata: TokenizerMetadata, why: str) -> UserError:
    return UserError(
        f"{metadata.folder}: {why}, so its tokens would not be those of its own tokenizer; if it has a tokenizer.json,"
        " put that into the folder"
    )


def _check_class(metadata: TokenizerMetadata, known: set[str], files: str) -> None:
    if metadata.tokenizer_class not in known:
        raise _refused(metadata, f"{files} for tokenizer_class={shown(metadata.tokenizer_class)} cannot be read")


def _effective(added: tuple[AddedToken, ...], vocab: dict[str, int], end: str) -> tuple[AddedToken, ...]:
    """The added tokens that make a difference: special ones that the vocabulary has are never found in text anyway."""
    marked = [dataclasses.replace(token, special=token.special or token.content == end) for token in added]
    return tuple(token for token in marked if not token.special or vocab.get(token.content) != token.id)


def _bpe_settings(files: dict[str, bytes], metadata: TokenizerMetadata) -> Settings:
    _check_class(metadata, set(_BPE_CLASSES), "vocab.json and merges.txt")
    splitting, own_end = _BPE_CLASSES[metadata.tokenizer_class]
    end = metadata.named.get("eos_token", own_end)
    return Settings(
        end_of_text="" if end == "<|endoftext|>" else end,
        added=_effective(metadata.added, bpe_vocabulary(files), end),
        splitting=splitting,
        prefix_space=metadata.option("add_prefix_space") or False,
    )


def bpe_vocabulary(files: dict[str, bytes]) -> dict[str, int]:
    """The vocabulary of vocab.json; empty if it is none, which the tokenizer itself reports."""
    try:
        vocab = parse_json(files["vocab.json"])
    except UserError:
        return {}
    return vocab if isinstance(vocab, dict) else {}


def _wordpiece_settings(files: dict[str, bytes], metadata: TokenizerMetadata) -> Settings:
    _check_class(metadata, _WORDPIECE_CLASSES, "vocab.txt")
    if metadata.option("do_basic_tokenize") is False:
        raise _refused(metadata, "do_basic_tokenize=false is not supported")
    if metadata.options.get("never_split"):
        raise _refused(metadata, "never_split is not supported")
    lower_case, chinese = metadata.option("do_lower_case"), metadata.option("tokenize_chinese_chars")
    end = metadata.named.get("eos_token") or metadata.named.get("sep_token", "[SEP]")
    return Settings(
        end_of_text="" if end == "[SEP]" else end,
        unknown=metadata.named.get("unk_token", "[UNK]"),
        added=_effective(metadata.added, wordpiece_vocabulary(files), end),
        lower_case=lower_case is not False,
        strip_accents=metadata.option("strip_accents"),
        separate_chinese=chinese is not False,
    )


def wordpiece_vocabulary(files: dict[str, bytes]) -> dict[str, int]:
    """The vocabulary of vocab.txt. What is not UTF-8 is replaced here; the tokenizer itself reports it."""
    lines = files["vocab.txt"].decode(errors="replace").rstrip("\n").split("\n")
    return {line.rstrip("\r"): index for index, line in enumerate(lines)}


def _sentencepiece_settings(model: bytes, metadata: TokenizerMetadata) -> Settings:
    _check_class(metadata, _SENTENCEPIECE_CLASSES, "a sentencepiece model")
    if metadata.option("do_lower_case"):
        raise _refused(metadata, "do_lower_case=true is not supported for a sentencepiece model")
    if metadata.options.get("sp_model_kwargs"):
        raise _refused(metadata, "sp_model_kwargs are not supported")
    try:
        if not model:
            return Settings()
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        return Settings()  # the tokenizer itself reports that the file is no model
    wanted = metadata.option("add_prefix_space")
    prefix = "".join(pieces.encode("a", out_type=str)).startswith(SPACE_MARK)
    if wanted is not None and wanted != prefix:
        raise _refused(metadata, f"add_prefix_space={str(wanted).lower()} is not what the sentencepiece model does")
    size, own_end = pieces.vocab_size(), pieces.eos_id()
    end = metadata.named.get("eos_token", "")
    added = []
    for token in metadata.added:
        token = dataclasses.replace(token, special=token.special or token.content == end)
        if token.id >= size:
            if not token.special:
                raise _refused(metadata, f"the added token {shown(token.content)} is not in the sentencepiece model")
            added.append(token)
        elif pieces.id_to_piece(token.id) != token.content.replace(" ", SPACE_MARK):
            piece = pieces.id_to_piece(token.id)
            raise _refused(metadata, f"token {token.id} is {shown(token.content)}, but {shown(piece)} in the model")
    if end and own_end >= 0 and pieces.id_to_piece(own_end) == end:
        end = ""
    return Settings(end_of_text=end, added=tuple(added))


def merges_of(content: bytes) -> list[tuple[str, str]]:
    """The merges of a merges.txt. Raises ValueError if it is not UTF-8."""
    lines = content.decode().split("\n")
    parts = [line.partition(" ") for line in lines if line.strip() and not line.startswith("#version")]
    return [(left, right) for left, _, right in parts]
