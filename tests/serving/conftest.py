"""A tiny model, servers of it on loopback, and the client of the benchmark."""

import contextlib
import dataclasses
import importlib
import pathlib
import sys
import threading
import types
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.config import ModelConfig
from armd_jax.core import parameters
from armd_jax.data.tokenizers import BytesTokenizer
from armd_jax.inference.language_model import LanguageModel
from armd_jax.serving import server
from armd_jax.serving.api import Limits
from armd_jax.serving.batching import Batcher

BENCHMARKS = pathlib.Path(__file__).parents[2] / "experiments/benchmarks"
LENGTH = 64


@dataclasses.dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    lm: LanguageModel
    batcher: Batcher


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    """A model of bytes with random weights, most of whose texts are no UTF-8, and few of which end by themselves."""
    sizes = dict(num_layers=2, two_stream_layers=1, width=16, num_heads=2, positional_width=8)
    config = ModelConfig(vocab_size=257, max_length=LENGTH, dtype="float32", **sizes)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), shapes)
    return LanguageModel(config, params, BytesTokenizer())


@pytest.fixture(scope="session")
def serve(lm: LanguageModel) -> Callable[..., contextlib.AbstractContextManager[Served]]:
    """`with serve(max_queue=4) as served:` runs a server of the model in a thread."""

    @contextlib.contextmanager
    def run(
        max_batch: int = 4, max_queue: int = 64, limits: Limits | None = None, host: str = "127.0.0.1"
    ) -> Iterator[Served]:
        with server.listen(host, 0) as listener:
            batcher = Batcher(lm, max_batch, max_queue)
            limits = limits or Limits(max_tokens=LENGTH)
            running = server.Server(lm, "tiny", batcher, limits, server.hosts(listener, host), grace=5.0)
            thread = threading.Thread(target=running.run, args=([listener],))
            thread.start()
            try:
                yield Served(server.url(listener), lm, batcher)
            finally:
                running.should_exit = True
                thread.join()

    return run


@pytest.fixture(scope="session")
def client() -> Iterator[types.ModuleType]:
    """The module of the benchmark, with its client."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("serve")
    sys.path.remove(str(BENCHMARKS))
    for name in ("serve", "common"):
        sys.modules.pop(name, None)
