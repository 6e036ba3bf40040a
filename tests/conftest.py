"""Fixtures that several folders of tests share: a small corpus, and one trained smoke run."""

import atexit
import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One cache of compiled programs for the workers and for every process that tests start: many of them train the same
    # small model. The first process to come here makes it, and removes it at the end.
    _CACHE = tempfile.mkdtemp(prefix="armd-test-programs-")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax
import pytest

from armd_jax.cli import main as cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
_MANY_MAPPINGS = 10_000  # of the 65,530 that a process may have
_WORDS = "the a river stone light moves under over slowly quickly and or bird tree sees finds old new"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, the longest folders among them at the very beginning.

    Two workers take file after file, and what is left for the end should be short.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path, reverse=True)
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def _few_mappings() -> Iterator[None]:
    """Gives compiled programs back between files, before a process has as many memory mappings as Linux allows it.

    Each program takes several, and XLA ends the process with a segmentation fault if it gets no more.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        jax.clear_caches()


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compiles without the costly passes: for toy models, where compiling takes longer than running."""
    with _quick():
        yield


@contextlib.contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.fixture
def full_disk() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """`with full_disk(size):` makes every write beyond `size` bytes of a file fail, as it does on a full disk.

    It is a limit on the size of files, which needs no rights. The error is EFBIG instead of ENOSPC.
    """
    return _file_size_limit


@pytest.fixture
def heeded() -> Iterator[None]:
    """Signals that are sent to processes have their effect, even if the tests were started with `nohup`."""
    numbers = (signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A .jsonl file of 60 short documents, the same in every run."""
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    documents = [" ".join(rng.choices(_WORDS.split(), k=rng.randint(20, 60))) + f".\n{n}\n" for n in range(60)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return file


@pytest.fixture(scope="session")
def smoke_config() -> str:
    """The `--config` of the run that `smoke_run` holds."""
    return f"{ROOT / 'experiments' / 'quickstart.py'}:smoke"


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, smoke_config: str, corpus: pathlib.Path) -> pathlib.Path:
    """A finished run of the quickstart experiment in its smoke size, on the small corpus; its model never changes."""
    workdir = tmp_path_factory.mktemp("smoke") / "run"
    with _quick():
        command = ["train", f"--config={smoke_config}", f"--workdir={workdir}", f"--config.data.path={corpus}"]
        assert cli.main(command) == 0
    return workdir
