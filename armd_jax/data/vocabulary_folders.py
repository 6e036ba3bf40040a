"""Folders of vocabulary files of every vintage: which files make the tokenizer, and what the others say about it.

The older forms are `vocab.json` with `merges.txt` (byte-level BPE), `vocab.txt` (WordPiece) and a sentencepiece model;
every newer tokenizer is one `tokenizer.json`. If an older form stands beside a `tokenizer.json`, it is read if both say
the same, and `tokenizer.json` if they do not.
"""

import codecs
import dataclasses
from pathlib import Path

from armd_jax import typed
from armd_jax.data import tokenizer_json
from armd_jax.data.tokenizer_metadata import TokenizerMetadata, parse_json, read_metadata
from armd_jax.data.vocabulary_settings import JSON_FILE, MODEL_FILE, PLAIN, Settings, Vocabulary, with_settings
from armd_jax.errors import UserError
from armd_jax.names import VocabularyTokenizerKind

SETTINGS_FILE = "vocabulary_settings.json"  # what `Tokenizer.save` writes if the settings are not those of a plain one
VOCABULARY_FILES: dict[VocabularyTokenizerKind, tuple[str, ...]] = {
    "bpe": ("vocab.json", "merges.txt"),
    "wordpiece": ("vocab.txt",),
    "tokenizer_json": (JSON_FILE,),
}
# The names under which GPT-2's two files were first published.
_OTHER_NAMES = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
_MODELS = ("*.model", "*.spm")  # sentencepiece.bpe.model, spiece.model, spm.model, source.spm


def read_saved(folder: Path) -> Vocabulary | None:
    """What `Tokenizer.save` wrote into `folder`, byte for byte. None if there are no vocabulary files."""
    vocabulary = _older_form(folder) or _form(folder, "tokenizer_json")
    if vocabulary is None or not (folder / SETTINGS_FILE).is_file():
        return vocabulary
    try:
        values = parse_json((folder / SETTINGS_FILE).read_bytes())
        return dataclasses.replace(vocabulary, settings=typed.build(Settings, values, any_text=True))
    except UserError as error:
        raise UserError(f"{folder / SETTINGS_FILE}: {error}") from error


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary in a folder that another program wrote. None if there are no vocabulary files.

    Byte order marks and line ends of Windows are taken out of text files. Raises UserError if something that stands
    beside the vocabulary would change its tokens and is not supported.
    """
    older, newer = _older_form(folder), _form(folder, "tokenizer_json")
    if older is None and newer is None:
        return None
    metadata = read_metadata(folder)
    refused: UserError | None = None
    if older is not None:
        try:
            older = with_settings(_as_unix_text(older), metadata)
        except UserError as error:
            refused, older = error, None
    if newer is not None:
        return _choose(_as_unix_text(newer), older, metadata)
    if refused is not None:
        raise refused
    return older


def _choose(newer: Vocabulary, older: Vocabulary | None, metadata: TokenizerMetadata) -> Vocabulary:
    """The older form if tokenizer.json says the same, and else tokenizer.json."""
    try:
        value = parse_json(newer.files[JSON_FILE])
        if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
            raise UserError("it is no tokenizer of the tokenizers library: it has no model")
        if older is not None and tokenizer_json.says_the_same(value, older):
            return older
        return dataclasses.replace(newer, settings=tokenizer_json.json_settings(value, metadata))
    except UserError as error:
        raise UserError(f"{metadata.folder / JSON_FILE}: {error}") from error


def settings_file(settings: Settings) -> dict[str, bytes]:
    """The file that holds settings, by its name. There is none for those of a plain vocabulary."""
    return {} if settings == PLAIN else {SETTINGS_FILE: typed.to_json(settings, indent=2).encode() + b"\n"}


# The files


def _form(folder: Path, kind: VocabularyTokenizerKind) -> Vocabulary | None:
    """The files of one kind in a folder, if all are there."""
    found = {}
    for name in VOCABULARY_FILES[kind]:
        candidates = [folder / name, folder / _OTHER_NAMES.get(name, name)]
        file = next((file for file in candidates if file.is_file()), None)
        if file is None:
            return None
        found[name] = file.read_bytes()
    return Vocabulary(kind, found, str(folder))


def _older_form(folder: Path) -> Vocabulary | None:
    if vocabulary := _form(folder, "bpe") or _form(folder, "wordpiece"):
        return vocabulary
    models = [file for pattern in _MODELS for file in folder.glob(pattern)]
    return (
        Vocabulary("sentencepiece", {MODEL_FILE: models[0].read_bytes()}, str(models[0])) if len(models) == 1 else None
    )


def _as_unix_text(vocabulary: Vocabulary) -> Vocabulary:
    """The vocabulary as it would be if no editor had added a byte order mark or line ends of Windows."""
    files = {
        name: content if name == MODEL_FILE else content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
        for name, content in vocabulary.files.items()
    }
    return dataclasses.replace(vocabulary, files=files)
