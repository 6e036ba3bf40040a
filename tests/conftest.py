"""Fixtures that several folders of tests share: a small corpus, one trained smoke run, a small sweep in files."""

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
from armd_jax.config import Config, ModelConfig, TrainingConfig, to_json

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


# --- a small sweep whose figures can be computed by hand --------------------------------------------------------------

_STEPS = 1600
# Held-out losses after 100, 400 and 1600 steps, and bits per byte, by row and seed.
_LOSSES = {
    "model=AR": {0: (6.0, 5.0, 3.5), 1: (6.0, 5.0, 3.0), 2: (6.0, 5.0, 4.5)},
    "model=MDLM": {0: (7.0, 6.0, 4.0), 1: (7.0, 6.0, 3.0), 2: (7.0, 6.0, 4.0)},
    "model=ARMD": {0: (5.0, 3.0, 2.5), 1: (5.0, 3.0, 2.5), 2: (5.0, 3.0, 2.5)},
    "model=wide": {0: (5.0, 3.0, 2.5)},
}
_BITS = {
    "model=AR": {0: 2.0, 1: 2.2, 2: 2.4},
    "model=MDLM": {0: 4.0, 1: 4.0, 2: 4.0},
    "model=ARMD": {0: 1.0, 1: 3.3, 2: 0.1},
    "model=wide": {0: 0.1},
}


def _small_member(run: pathlib.Path, row: str, seed: int) -> None:
    """The files of a finished member."""
    run.mkdir(parents=True)
    bounds = row == "model=MDLM"
    model = ModelConfig(kind="denoiser" if bounds else "armd", max_length=64)
    (run / "config.json").write_text(
        to_json(Config(model=model, training=TrainingConfig(num_steps=_STEPS, batch_size=2)))
    )
    rows = []
    for step, loss, rate in zip((100, 400, 1600), _LOSSES[row][seed], (None, 1280.0, 2560.0), strict=True):
        rows.append({"step": step, "train/nll": loss + 1} | ({"train/tokens_per_second": rate} if rate else {}))
        rows.append({"step": step, "eval/nll": loss} | ({"eval/nll_upper_bound": loss} if bounds else {}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    score = {"nats_per_token": _BITS[row][seed] * 2, "bits_per_byte": _BITS[row][seed]}
    strided = {"4": {"bits_per_byte": _BITS[row][seed] + 1}} if row == "model=AR" and seed < 2 else {}
    price = {"2": {"independence_gap": 0.25}, "4": {"independence_gap": 0.5}}
    evaluation = {"split": "test", "strided": strided, "price": price, "elbo" if bounds else "left_to_right": score}
    (run / "eval.json").write_text(json.dumps(evaluation))
    done = {"status": "finished", "done": ["train", "eval --no-baselines"], "error": ""}
    (run / "member.json").write_text(json.dumps(done))


@pytest.fixture
def make_sweep(tmp_path) -> Callable[..., pathlib.Path]:
    """Makes the sweep in a folder of a name: `model=ARMD,seed=2` failed, and `model=wide` is under way."""

    def make(name: str = "sweep") -> pathlib.Path:
        folder = tmp_path / name
        members = []
        for row, by_seed in _LOSSES.items():
            for seed in by_seed:
                _small_member(folder / "members" / f"{row},seed={seed}", row, seed)
                member = {"name": f"{row},seed={seed}", "row": row, "seed": seed, "overrides": {}}
                members.append(member | {"values": {"model": row.removeprefix("model=")}})
        record = {"config": "/somewhere/experiments/small.py:smoke", "axes": ["model"], "members": members}
        (folder / "sweep.json").write_text(json.dumps(record))
        failed = {"status": "failed", "done": ["train"], "error": "eval: out of memory"}
        (folder / "members/model=ARMD,seed=2/member.json").write_text(json.dumps(failed))
        (folder / "members/model=wide,seed=0/member.json").unlink()
        return folder

    return make
