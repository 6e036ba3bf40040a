"""The data of a run: prepared from what its config names, and given to the devices as global batches."""

import contextlib
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Generator, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from armd_jax import config as configs
from armd_jax import remote
from armd_jax.config import Config
from armd_jax.data import loader, mixture, packing, prepared, tokenizers
from armd_jax.data import manifest as manifests
from armd_jax.data.corpora import open_corpus
from armd_jax.data.mixture import Data, Mixture
from armd_jax.data.packing import PreparedData
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.training import sharding
from armd_jax.training import workdir as workdirs

_LONGEST = 8192  # bytes of a digest and a path


def prepare(
    config: Config, workdir: pathlib.Path, progress: bool = True, old: Config | None = None
) -> tuple[Data, Config]:
    """The prepared data of the config, made now if they are not there yet, and the config with what they decide.

    The latter are the vocabulary size, and the tokenizer if `data.path` or `data.mixture` names prepared folders.

    progress: say on stderr what is done.
    old: the config of the run that goes on in the workdir. Its data may have another name now, but not another content.
    Raises UserError if the data cannot be prepared, or are not those that the run was trained on.
    """
    length = config.model.max_length
    data: Data
    if config.data.mixture:
        data, config = _mixed(config, workdir, progress, old)
    elif (chosen := prepared.folder_of(config.data.path)) is not None:
        data, section = prepared.open_chosen(chosen, config.data, length)
        config = dataclasses.replace(config, data=section)
        if old is not None:
            workdirs.check_same_data(workdir, data, workdirs.data_changes(old, config))
    elif old is not None:
        data = _again(config, old, workdir, progress)
    else:
        tokenizer = tokenizers.ready_made(config.data)
        if tokenizer is not None:
            with_vocabulary(config, tokenizer, old)  # a mistake is found before any text is prepared
        root = _root(config, workdir)
        corpus = open_corpus(config.data, manifests.known_files(root))
        _check_writable(root, packing.folder_for(config.data, corpus, length, root))
        data = packing.prepare(config.data, length, root, progress=progress, corpus=corpus)
        _store(root)
    config = with_vocabulary(config, data.tokenizer, old)
    if progress and isinstance(data, Mixture):
        print(mixture.described(data, config.training.num_steps, config.training.batch_size), file=sys.stderr)
    if old is not None and progress and (changes := workdirs.data_changes(old, config)):
        print(f"{workdir}: goes on with the same rows and the same tokenizer ({changes})", file=sys.stderr)
    return data, config


def _mixed(config: Config, workdir: pathlib.Path, progress: bool, old: Config | None) -> tuple[Data, Config]:
    """What `data.mixture` names, and the config with its tokenizer. `_again` is the same for other data."""
    try:
        data, section = mixture.open_chosen(config.data, config.model.max_length)
    except UserError as error:
        if old is None:
            raise
        if config.data.tokenizer == DataConfig.tokenizer:  # the default stands for that of the rows
            section = dataclasses.replace(config.data, tokenizer=old.data.tokenizer)
            config = dataclasses.replace(config, data=section)
        own = own_rows(workdir, old) if not workdirs.data_changes(old, config) else None
        if own is None:
            raise
        if progress:
            print(f"{error}; the run goes on with its own rows in {mixture.place_of(own)}", file=sys.stderr)
        return own, config
    config = dataclasses.replace(config, data=section)
    if old is not None:
        workdirs.check_same_data(workdir, data, workdirs.data_changes(old, config))
    return data, config


def _root(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    """The folder that prepared folders are in. One in object storage is fetched, with all that is in it."""
    if not config.data.cache_dir:
        return workdir / "data"
    return remote.local(config.data.cache_dir)


def _check_writable(root: pathlib.Path, folder: pathlib.Path) -> None:
    """Raises UserError if `folder` has to be made and cannot be stored: before hours of work."""
    if (copy := remote.copy_of(root)) is not None and not folder.exists():
        copy.check_writable()


def _store(root: pathlib.Path) -> None:
    if (copy := remote.copy_of(root)) is not None:
        copy.store()


def _again(config: Config, old: Config, workdir: pathlib.Path, progress: bool) -> PreparedData:
    """The data of a run that goes on: its own rows if they are what the config names, else what the config names.

    If the same config as before names something that cannot be read any more, such as text that is not on this machine,
    the run's own rows are taken.
    """
    changes, root = workdirs.data_changes(old, config), _root(config, workdir)
    own = own_rows(workdir, old)
    if isinstance(own, Mixture) or len(old.data.mixture) > 1:  # text that is prepared here is one folder
        raise workdirs.other_data(workdir, "on a mixture", changes, None)
    known = dict(manifests.known_files(root)) | dict(manifests.known_files(own.folder) if own is not None else {})
    try:
        same_tokenizer = own is None or prepared.made_with(config.data, own.manifest.tokenizer)
        corpus = open_corpus(config.data, known)
    except UserError as error:
        if own is None or changes:
            raise
        if progress:
            print(f"{error}; the run goes on with its own rows in {own.folder}", file=sys.stderr)
        return own
    if not same_tokenizer:
        raise workdirs.other_data(workdir, "with another tokenizer", changes, own)
    # The embedded corpus is another one in every version of Python; nobody has changed anything.
    embedded = not config.data.path and not changes
    if own is not None and (embedded or prepared.comes_from(own.manifest, corpus)):
        return own
    # Files of other names may hold the same documents. That shows once they are rows.
    folder = packing.folder_for(config.data, corpus, config.model.max_length, root)
    is_new = not folder.exists() and root == workdir / "data"
    _check_writable(root, folder)
    try:
        data = packing.prepare(config.data, config.model.max_length, root, progress=progress, corpus=corpus)
    except UserError as error:
        if not changes:
            raise
        raise workdirs.other_data(workdir, "on other rows", f"{changes}: {error}", own) from error
    try:
        workdirs.check_same_data(workdir, data, changes, own)
    except UserError:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    _store(root)
    if own is not None and progress and own.manifest.splits != data.manifest.splits:
        print(f"{workdir}: the training rows are as before, but the held-out text has changed", file=sys.stderr)
    return data


def own_rows(run: pathlib.Path, config: Config) -> Data | None:
    """The rows that a run was trained on, wherever they lie; None if they are gone, or the run does not say which.

    They are known by their digest, so it does not matter how the config spells where they came from. They are looked
    for in the run's folder, where they were at its last start, and where the config says; nothing is written there.
    Raises UserError if they are damaged.
    """
    trained = workdirs.trained_on(run)
    if trained is None:
        return None
    if config.data.mixture:
        return mixture.find(config.data, trained.folders, trained.digest)
    last = trained.folders
    # Its name comes first: other folders may have the same training rows, but other held-out ones.
    inside = prepared.open_rows([*(run / "data" / folder.name for folder in last), run / "data"], trained.digest)
    if inside is not None:
        return inside
    for _, manifest in manifests.prepared_below(run / "data"):
        if isinstance(manifest, UserError):
            raise manifest
    chosen = prepared.folder_of(config.data.path)
    cache = [remote.local(config.data.cache_dir)] if config.data.cache_dir else []
    return prepared.open_rows(
        [*map(remote.local, last), *cache, *([chosen] if chosen is not None else [])], trained.digest
    )


def prepare_together(config: Config, workdir: pathlib.Path, progress: bool, old: Config | None) -> tuple[Data, Config]:
    """`prepare` in every process. Only the first one reads text; the others open the folder that it made or found.

    On a machine that cannot see this folder, the text is prepared once more.
    Raises UserError if the rows of a process are not those of the first one.
    """
    if jax.process_index() == 0:
        data, config = prepare(config, workdir, progress, old)
        folder = "" if isinstance(data, Mixture) else data.folder.absolute()
        _from_first(f"{data.digest} {folder}")
        return data, config
    digest, _, first = _from_first("").partition(" ")
    chosen = bool(config.data.mixture) or prepared.folder_of(config.data.path) is not None
    found: Data | None = None if chosen else prepared.open_rows([pathlib.Path(first)], digest)
    if found is None:
        found, config = prepare(config, workdir, progress=False, old=old)
    if found.digest != digest:
        raise UserError(
            f"process {jax.process_index()}: its rows in {mixture.place_of(found)} are not those of process 0"
            f"{' in ' * bool(first)}{first}:"
            " give all machines the same text, or a data.cache_dir that all of them see"
        )
    return found, with_vocabulary(config, found.tokenizer, old)


def _from_first(text: str) -> str:
    """The text that the first process gives, in every process, once all of them have come here."""
    if jax.process_count() == 1:
        return text
    content = text.encode(errors="surrogateescape")[:_LONGEST].ljust(_LONGEST, b"\0")
    shared = multihost_utils.broadcast_one_to_all(np.frombuffer(content, np.uint8).astype(np.int32))
    return np.asarray(shared).astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="surrogateescape")


def with_vocabulary(config: Config, tokenizer: Tokenizer, old: Config | None = None) -> Config:
    """The config with its end-of-text, and its vocabulary size: the tokenizer's, or that of the weights to start from.

    Those of a pretrained model may have rows for more ids than the tokenizer has tokens, and keep them.
    old: as in `prepare`. A run that goes on does not read again what it started from.
    Raises UserError if the config names another of either.
    """
    before = 0
    if old is not None:
        before = old.model.vocab_size
    elif config.training.init_from:
        before = configs.read(remote.local(config.training.init_from)).model.vocab_size
    size = max(before, tokenizer.vocab_size)  # if `before` is smaller, this is another tokenizer, which is refused
    if config.model.vocab_size not in (0, size):
        whose = "the data's tokenizer has" if size == tokenizer.vocab_size else "the weights to start from have"
        raise UserError(f"model.vocab_size={config.model.vocab_size}, but {whose} {size}; leave it at 0")
    given, end = config.data.end_of_text, tokenizer.end_of_text
    if given not in (-1, end):
        raise UserError(f"data.end_of_text={given}, but that of the data's tokenizer is {end}; leave it at -1")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=size),
        data=dataclasses.replace(config.data, end_of_text=end),
    )


@contextlib.contextmanager
def global_batches(config: Config, data: Data, mesh: Mesh, first: int) -> Generator[Iterator[tuple[int, jax.Array]]]:
    """(step, tokens_BN) from step `first` on, as global arrays. Each process reads only the rows of its own devices."""
    size = config.training.batch_size
    here = sharding.rows_here(mesh, size)
    with loader.train_batches(data, size, config.training.seed, first, here) as batches:
        yield ((number, sharding.global_rows(mesh, size, here, tokens)) for number, tokens in batches)
