"""Any tokenizer as one `tokenizer.json`, the file that Hugging Face's fast tokenizers are read from."""

import tempfile
from pathlib import Path
from typing import Any, assert_never

import tokenizers as library

from armd_jax.data.sentencepiece_training import SPACE_MARK
from armd_jax.data.tokenizers import EVERY_BYTE, PROBE, Tokenizer
from armd_jax.data.vocabulary_building import build
from armd_jax.data.vocabulary_folders import read_saved
from armd_jax.data.vocabulary_settings import MODEL_FILE, Vocabulary
from armd_jax.errors import UserError

_BYTES_END = "<|endoftext|>"


def end_token(tokenizer: Tokenizer) -> str:
    """What the end-of-text is called in `tokenizer_json`."""
    return str(_made(tokenizer).id_to_token(tokenizer.end_of_text))


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The content of a tokenizer.json that gives the same ids.

    Two things differ, because that file cannot say them: a text that spells a special token becomes that token, and a
    sentencepiece model takes a literal U+2581 for a space.
    Raises UserError if its ids for a text with every byte are others, as those of some sentencepiece models are.
    """
    made = _made(tokenizer)
    probe = (PROBE + EVERY_BYTE).replace(SPACE_MARK, "")
    made.encode_special_tokens = True
    for text in (probe, "The old tree,\n\nand  2024 leaves."):
        if made.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise UserError(f"its {tokenizer.kind} tokenizer has no tokenizer.json that gives the same tokens")
    return made.to_str(pretty=True)


def _made(tokenizer: Tokenizer) -> library.Tokenizer:
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save(Path(temporary))
        vocabulary = read_saved(Path(temporary))
    if vocabulary is None:
        return _of_bytes()
    match vocabulary.kind:
        case "sentencepiece":
            return _of_sentencepiece(vocabulary)
        case "bpe" | "wordpiece" | "tokenizer_json":
            return build(vocabulary.kind, vocabulary.files, vocabulary.settings).tokenizer
        case _:
            assert_never(vocabulary.kind)


def _of_bytes() -> library.Tokenizer:
    """Byte-level BPE without merges. The library writes each byte as a printable character."""
    # In the sequence of their ids: printable bytes stand for themselves, the others for characters from 256 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}
    made = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens([library.AddedToken(_BYTES_END, special=True, normalized=False)])
    return made


def _of_sentencepiece(vocabulary: Vocabulary) -> library.Tokenizer:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        extra = "pip install -e '.[import]'"
        raise UserError(f"a sentencepiece model needs protobuf to be written as a tokenizer.json: {extra}") from error
    proto: Any = sentencepiece_model_pb2  # its classes are made when it is imported, and have no types
    model = proto.ModelProto.FromString(vocabulary.files[MODEL_FILE])
    piece, trainer, rules = proto.ModelProto.SentencePiece, model.trainer_spec, model.normalizer_spec
    pieces = [each.piece for each in model.pieces]
    unknown = next((number for number, each in enumerate(model.pieces) if each.type == piece.UNKNOWN), None)
    if trainer.model_type == trainer.BPE:
        kept = [each.piece for each in model.pieces if each.type == piece.NORMAL]
        rank = {each.piece: each.score for each in model.pieces if each.type == piece.NORMAL}
        merges = [
            (each[:cut], each[cut:])
            for each in sorted(kept, key=lambda name: -rank[name])
            for cut in range(1, len(each))
            if each[:cut] in rank and each[cut:] in rank
        ]
        made = library.Tokenizer(
            library.models.BPE(
                vocab={name: number for number, name in enumerate(pieces)},
                merges=merges,
                unk_token=None if unknown is None else pieces[unknown],
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    else:
        scored = [(each.piece, each.score) for each in model.pieces]
        made = library.Tokenizer(library.models.Unigram(scored, unknown, trainer.byte_fallback))
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(library.normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [library.normalizers.Strip(), library.normalizers.Replace(library.Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(library.normalizers.Prepend(" "))
    made.normalizer = library.normalizers.Sequence([*steps, library.normalizers.Replace(" ", SPACE_MARK)])
    decode = [library.decoders.Replace(SPACE_MARK, " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
    made.decoder = library.decoders.Sequence(
        [*decode, *([library.decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else [])]
    )
    made.add_special_tokens(
        [library.AddedToken(each.piece, normalized=False) for each in model.pieces if each.type == piece.CONTROL]
    )
    made.add_tokens(
        [library.AddedToken(each.piece, normalized=False) for each in model.pieces if each.type == piece.USER_DEFINED]
    )
    for token in vocabulary.settings.added:
        made.add_special_tokens([library.AddedToken(token.content, normalized=False)])
    return made
