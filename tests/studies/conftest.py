"""A sweep of tiny models, as a file: trainings of a few seconds, nearly all of which is Python that starts."""

import pathlib
import textwrap
from collections.abc import Callable

import pytest

from armd_jax.studies import plan as plans
from armd_jax.studies.plan import Plan


@pytest.fixture
def sweep_file(tmp_path: pathlib.Path, corpus: pathlib.Path) -> Callable[..., str]:
    """(members, after) -> the `--config` of a sweep: 8 steps of an autoregressive model of one layer."""

    def write(members: str, after: str = "()") -> str:
        file = tmp_path / "tiny_sweep.py"
        text = """
            from armd_jax import config as configs
            from armd_jax.sweeps import Sweep, axis, chain, choices, product, seeds, then, zip_


            def get_sweep(arg=""):
                base = configs.default_config_dict()
                base.data.update(tokenizer="bytes", path=CORPUS)
                base.model.update(max_length=16, num_layers=1, two_stream_layers=0, aggregator="shift")
                base.model.update(width=16, num_heads=2, positional_width=8)
                base.order.kind = "left_to_right"
                base.training.update(num_steps=8, batch_size=4, log_every=1, eval_every=4, eval_batches=1)
                base.training.update(checkpoint_every=2, tensorboard=False)
                base.optimizer.update(warmup_steps=2, ema_decay=0.9)
                return Sweep(base, MEMBERS, AFTER)
            """
        text = textwrap.dedent(text).replace("CORPUS", repr(str(corpus)))
        file.write_text(text.replace("MEMBERS", members).replace("AFTER", after))
        return str(file)

    return write


@pytest.fixture
def make_plan(tmp_path: pathlib.Path, sweep_file: Callable[..., str]) -> Callable[..., Plan]:
    """(members, after, overrides, out) -> the plan of that sweep in a folder of that name."""

    def make(members: str, after: str = "()", overrides: tuple[str, ...] = (), out: str = "out") -> Plan:
        spec = sweep_file(members, after)
        return plans.make(plans.load(spec, overrides), spec, tmp_path / out, lambda words: None)

    return make
