"""Documents packed into rows of fixed length on disk, and the prepared folders that hold them.

All documents of a split, each followed by end-of-text, form one stream of tokens, which is cut into rows of exactly
N = `length` tokens (the model brings its own start token). If the last row is not full, it is stored padded with
end-of-text; how many of its tokens are real follows from the token count. A prepared folder holds `manifest.json`,
`tokenizer/` and the shards. It appears whole, by a rename, or not at all.
"""

import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard

import numpy as np
from tqdm import tqdm

from armd_jax import typed
from armd_jax.data import progress as progress_notes
from armd_jax.data import tokenizers
from armd_jax.data.batching import Tally, progress_bar
from armd_jax.data.building import large_folder, remove_torn
from armd_jax.data.corpora import Corpus, open_corpus
from armd_jax.data.manifest import (
    FORMAT,
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    Counts,
    Manifest,
    PackedSplit,
    SourceIdentity,
    TokenizerIdentity,
    TrainingSample,
    known_files,
    may_hold,
    read_manifest,
    row_dtype,
    write_manifest,
)
from armd_jax.data.progress import Part, Progress
from armd_jax.data.reading import LeftOut
from armd_jax.data.shards import PackedRows, ShardWriter, check_shard
from armd_jax.data.token_streams import FromText, TokenStreams
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.names import Split

HASHED_AT_ONCE = 1 << 30  # bytes of shards, a second or two of sha256; of larger data each shard is hashed at first use


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A prepared folder whose files fit its manifest.

    Attributes:
      hashed: whether the shards' sha256 were compared already. If not, `rows` compares each at its first use.
    """

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    hashed: bool = False

    @property
    def length(self) -> int:
        """N, tokens per row."""
        return self.manifest.row_length

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that exist."""
        return tuple(self.manifest.splits)

    @property
    def digest(self) -> str:
        """What decides the training batches besides seed and step, see `Manifest.digest`."""
        return self.manifest.digest

    @property
    def left_out(self) -> dict[Split, LeftOut]:
        """Documents that are in no row, by the splits that the source itself has."""
        return self.manifest.left_out

    def counts(self, split: str) -> Counts:
        """The size of `split`. Raises UserError if there is no such split, as `num_rows` and `rows` do."""
        return self._split(split).counts

    def num_rows(self, split: str) -> int:
        """The number of stored rows, with the last one even if it is not full."""
        return self._split(split).rows

    def rows(self, split: str) -> PackedRows:
        """Random access to the rows of `split`."""
        return PackedRows(self.folder, self.manifest, self._split(split), self.hashed)

    def _split(self, split: str) -> PackedSplit:
        if not (_is_split(split) and split in self.manifest.splits):
            raise UserError(f"{self.folder} has no {split!r} split; it has {', '.join(self.splits)}")
        return self.manifest.splits[split]


def _is_split(name: str) -> TypeGuard[Split]:
    return name in typed.choices(Split)


def prepare(
    config: DataConfig, length: int, cache_root: Path, progress: bool = True, corpus: Corpus | None = None
) -> PreparedData:
    """The data that `config` names as rows of `length` tokens, prepared under `cache_root` if they are not there yet.

    Source files are hashed unless those that a prepared folder in `cache_root` was made from have the same names, sizes
    and modification times.

    corpus: that of `config`, if it is open already.
    Raises UserError if the corpus, the tokenizer or the folder cannot be used, and then leaves nothing behind.
    """
    corpus = corpus or open_corpus(config, known_files(cache_root))
    request, folder = tokenizers.request_of(config), folder_for(config, corpus, length, cache_root)
    if not os.path.exists(folder) and (cache_root / MANIFEST_FILE).is_file():
        folder = cache_root  # made by `armd prepare --out`: if it does not fit, the error says why
    if not os.path.exists(folder):
        streams = FromText(config, corpus, workers=1)
        identity = _identity_of_work(config, streams, request, length)
        with large_folder(folder, MANIFEST_FILE, functools.partial(_goes_on, identity)) as partial:
            _write(config, streams, request, length, partial, progress)
    return _open_fitting(folder, corpus, request, length)


def folder_for(config: DataConfig, corpus: Corpus, length: int, cache_root: Path) -> Path:
    """The folder under `cache_root` that `prepare` opens or makes. Its name is a hash of what decides the rows."""
    request = tokenizers.request_of(config)
    identity = "\0".join([str(FORMAT), corpus.fingerprint, corpus.split_rule, request, str(length)])
    return cache_root / hashlib.sha256(identity.encode()).hexdigest()[:16]


def prepare_into(
    config: DataConfig,
    length: int,
    out: Path,
    progress: bool = True,
    corpus: Corpus | None = None,
    workers: int = 1,
    streams: TokenStreams | None = None,
) -> PreparedData:
    """Like `prepare`, but in the folder `out`, which must be missing, empty, or hold exactly this preparation.

    workers: processes that tokenize. 1: this one. The files are the same for any number.
    streams: the tokens of the corpus, if they are there already.
    """
    corpus, request = corpus or open_corpus(config, known_files(out)), tokenizers.request_of(config)
    check_out(out)
    if (out / MANIFEST_FILE).is_file():
        if progress:
            _tell_selection(corpus)
    else:
        streams = streams or FromText(config, corpus, workers)
        identity = _identity_of_work(config, streams, request, length)
        with large_folder(out, MANIFEST_FILE, functools.partial(_goes_on, identity)) as partial:
            _write(config, streams, request, length, partial, progress)
    return _open_fitting(out, corpus, request, length)


def check_out(out: Path) -> None:
    """Raises UserError unless a folder is missing, empty, or holds prepared data."""
    remove_torn(out, MANIFEST_FILE, may_hold)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to prepare into")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_FILE).is_file():
        raise UserError(f"{out} is not empty and holds no prepared data; give another folder")


def open_prepared(folder: Path, config: DataConfig | None = None, length: int | None = None) -> PreparedData:
    """Opens a prepared folder.

    config: if given, the corpus that it names is opened too, and source, split rule and tokenizer must be its own.
    length: if given, the rows must have this many tokens.
    Raises UserError if a file is missing or was changed, or if the folder does not fit what is asked for.
    """
    manifest = read_manifest(folder)
    if length is not None:
        _check_equal(folder, "row length", "model.max_length", manifest.row_length, length)
    if config is not None:
        _check_source(folder, manifest, open_corpus(config), tokenizers.request_of(config))
    return _open_files(folder, manifest)


# Opening


def _open_fitting(folder: Path, corpus: Corpus, request: str, length: int) -> PreparedData:
    manifest = read_manifest(folder)
    _check_source(folder, manifest, corpus, request)
    _check_equal(folder, "row length", "model.max_length", manifest.row_length, length)
    return _open_files(folder, manifest)


def _open_files(folder: Path, manifest: Manifest) -> PreparedData:
    tokenizer = tokenizers.load(folder / TOKENIZER_FOLDER)
    expected = dataclasses.asdict(manifest.tokenizer)
    found = _identity(tokenizer, manifest.tokenizer.request, manifest.tokenizer.sample)
    for name, value in dataclasses.asdict(found).items():
        if value != expected[name]:
            raise UserError(f"{folder}: its tokenizer's {name} is not that of {MANIFEST_FILE}; prepare the data again")
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    at_once = sum(shard.bytes for shard in shards) <= HASHED_AT_ONCE
    for shard in shards:
        check_shard(folder, shard, at_once)
    return PreparedData(folder, manifest, tokenizer, hashed=at_once)


def _identity(tokenizer: Tokenizer, request: str, sample: TrainingSample | None) -> TokenizerIdentity:
    return TokenizerIdentity(
        request=request,
        kind=tokenizer.kind,
        hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        lossless=tokenizer.lossless,
        sample=sample,
    )


def _check_source(folder: Path, manifest: Manifest, corpus: Corpus, request: str) -> None:
    """Raises UserError if the folder was prepared from other documents, or with another tokenizer."""
    if manifest.source.fingerprint != corpus.fingerprint:
        raise UserError(
            f"{folder}: prepared from another corpus than data.path: {manifest.source.description}, not"
            f" {corpus.description} (or its content has changed since)"
        )
    fractions = "data.valid_fraction, data.test_fraction"
    _check_equal(folder, "split rule", fractions, manifest.split_rule, corpus.split_rule)
    _check_equal(folder, "tokenizer", "data.tokenizer, data.vocab_size", manifest.tokenizer.request, request)


def _check_equal(folder: Path, what: str, fields: str, found: object, wanted: object) -> None:
    """Raises UserError, naming the config's `fields` that decide it, if the folder has something else than wanted."""
    if found != wanted:
        raise UserError(f"{folder}: prepared with {what} {found!r}, but the config asks for {wanted!r} ({fields})")


# Making


def _identity_of_work(config: DataConfig, streams: TokenStreams, request: str, length: int) -> str:
    corpus = streams.corpus
    what = FORMAT, corpus.fingerprint, corpus.split_rule, request, length, config.shard_rows, streams.pieces
    return progress_notes.identity_of(*what)


def _goes_on(identity: str, partial: Path) -> bool:
    """Whether a killed process left whole shards of this very work."""
    return progress_notes.read(partial, identity) is not None


def _write(config: DataConfig, streams: TokenStreams, request: str, length: int, folder: Path, progress: bool) -> None:
    """Writes everything that a prepared folder holds, the manifest last."""
    corpus = streams.corpus
    for split in corpus.splits:
        if streams.is_empty(split):
            num_damaged = sum(left_out.damaged for left_out in streams.left_out().values())
            why = f" ({num_damaged} damaged documents left out)" if num_damaged else ""
            raise UserError(f"{corpus.description}: no text for the {split} split{why}")
    if progress:
        _tell_selection(corpus)  # before the hours that a large corpus takes, because a part of it may be missing
    identity = _identity_of_work(config, streams, request, length)
    done = progress_notes.read(folder, identity)
    if done is None:
        tokenizer = streams.tokenizer()
        tokenizer.save(folder / TOKENIZER_FOLDER)
        done = Progress(identity, sample=streams.sample)
        done.write(folder)
    else:
        tokenizer = tokenizers.load(folder / TOKENIZER_FOLDER)
    dtype = row_dtype(tokenizer.vocab_size)
    splits: dict[Split, PackedSplit] = {}
    for split in corpus.splits:
        if split in done.splits:
            splits[split] = done.splits[split]
        else:
            begun = done.part if done.part and done.part.split == split else Part(split)
            writer = ShardWriter(folder, split, config.shard_rows, begun.shards)
            note = functools.partial(_note, folder, dataclasses.replace(done, splits=dict(splits)))
            with progress_bar(f"preparing {split}", streams.size(split), progress) as bar:
                splits[split] = _pack(streams, tokenizer, length, np.dtype(dtype), writer, bar, begun, note)
            dataclasses.replace(done, splits=dict(splits), part=None).write(folder)
        if splits["train"].tokens < length:  # train comes first
            raise UserError(
                f"{corpus.description}: its {splits['train'].tokens} training tokens are fewer than the"
                f" {length} of one row (model.max_length)"
            )
    manifest = Manifest(
        format=FORMAT,
        row_length=length,
        dtype=dtype,
        shard_rows=config.shard_rows,
        tokenizer=_identity(tokenizer, request, done.sample),
        source=SourceIdentity(corpus.description, corpus.fingerprint, corpus.files),
        split_rule=corpus.split_rule,
        left_out=streams.left_out(done.splits),
        splits=splits,
    )
    (folder / progress_notes.FILE).unlink()
    write_manifest(folder, manifest)
    if progress:
        _tell(manifest)


def _tell_selection(corpus: Corpus) -> None:
    """Says on stderr which files are read, and why others are not."""
    for line in corpus.selection.lines():
        print(line, file=sys.stderr)


def _tell(manifest: Manifest) -> None:
    """Says on stderr what was prepared and what was left out."""
    for split, packed in manifest.splits.items():
        print(
            f"prepared {split}: {packed.documents:,} documents, {packed.bytes:,} bytes, {packed.tokens:,} tokens",
            file=sys.stderr,
        )
    for split, counts in manifest.left_out.items():
        if counts.damaged:
            print(f"{split}: {counts.damaged} damaged documents left out: {counts.first_damaged}", file=sys.stderr)


def _pack(
    streams: TokenStreams,
    tokenizer: Tokenizer,
    length: int,
    dtype: np.dtype,
    writer: ShardWriter,
    bar: tqdm,
    begun: Part,
    note: Callable[[Part], None],
) -> PackedSplit:
    """Writes the rows of one split behind those of `begun`, and returns its entry in the manifest.

    note: is told after every whole shard how far the split has come.
    """
    tally, num_tokens = Tally(), begun.tokens
    left = np.empty(0, dtype)  # tokens that do not fill a row yet
    try:
        folder = writer.folder / TOKENIZER_FOLDER
        parts = streams.read(begun.split, tokenizer, folder, dtype, begun.batch, tally, bar)
        for batch, part in enumerate(parts, start=begun.batch):
            skip = begun.skip if batch == begun.batch else 0
            before, shards = num_tokens - skip, len(writer.written)  # tokens of the split before this batch
            stream = np.concatenate([left, part[skip:]])
            num_tokens += len(part) - skip
            full = len(stream) // length * length
            writer.write(stream[:full].reshape(-1, length))
            left = stream[full:]
            if len(writer.written) > shards:
                whole = sum(shard.rows for shard in writer.written) * length
                note(Part(begun.split, tuple(writer.written), whole, batch, whole - before))
        if len(left):
            writer.write(np.pad(left, (0, length - len(left)), constant_values=tokenizer.end_of_text)[None])
    finally:
        writer.close()
    rows = sum(shard.rows for shard in writer.written)
    return PackedSplit(tally.documents, tally.bytes, tally.words, num_tokens, rows, tuple(writer.written))


def _note(folder: Path, progress: Progress, part: Part) -> None:
    dataclasses.replace(progress, part=part).write(folder)
