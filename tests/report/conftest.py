"""A small sweep whose figures can be computed by hand, in real files."""

import json
import pathlib
from collections.abc import Callable

import pytest

from armd_jax.config import Config, ModelConfig, TrainingConfig, to_json

STEPS = 1600
# Held-out losses after 100, 400 and 1600 steps, and bits per byte, by row and seed.
LOSSES = {
    "model=AR": {0: (6.0, 5.0, 3.5), 1: (6.0, 5.0, 3.0), 2: (6.0, 5.0, 4.5)},
    "model=MDLM": {0: (7.0, 6.0, 4.0), 1: (7.0, 6.0, 3.0), 2: (7.0, 6.0, 4.0)},
    "model=ARMD": {0: (5.0, 3.0, 2.5), 1: (5.0, 3.0, 2.5), 2: (5.0, 3.0, 2.5)},
    "model=wide": {0: (5.0, 3.0, 2.5)},
}
BITS = {
    "model=AR": {0: 2.0, 1: 2.2, 2: 2.4},
    "model=MDLM": {0: 4.0, 1: 4.0, 2: 4.0},
    "model=ARMD": {0: 1.0, 1: 3.3, 2: 0.1},
    "model=wide": {0: 0.1},
}


def _member(run: pathlib.Path, row: str, seed: int) -> None:
    """The files of a finished member."""
    run.mkdir(parents=True)
    bounds = row == "model=MDLM"
    model = ModelConfig(kind="denoiser" if bounds else "armd", max_length=64)
    (run / "config.json").write_text(
        to_json(Config(model=model, training=TrainingConfig(num_steps=STEPS, batch_size=2)))
    )
    rows = []
    for step, loss, rate in zip((100, 400, 1600), LOSSES[row][seed], (None, 1280.0, 2560.0), strict=True):
        rows.append({"step": step, "train/nll": loss + 1} | ({"train/tokens_per_second": rate} if rate else {}))
        rows.append({"step": step, "eval/nll": loss} | ({"eval/nll_upper_bound": loss} if bounds else {}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    score = {"nats_per_token": BITS[row][seed] * 2, "bits_per_byte": BITS[row][seed]}
    strided = {"4": {"bits_per_byte": BITS[row][seed] + 1}} if row == "model=AR" and seed < 2 else {}
    price = [{"streams": 2, "gap": 0.25}, {"streams": 4, "gap": 0.5}]
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
        for row, by_seed in LOSSES.items():
            for seed in by_seed:
                _member(folder / "members" / f"{row},seed={seed}", row, seed)
                member = {"name": f"{row},seed={seed}", "row": row, "seed": seed, "overrides": {}}
                members.append(member | {"values": {"model": row.removeprefix("model=")}})
        record = {"config": "/somewhere/experiments/small.py:smoke", "axes": ["model"], "members": members}
        (folder / "sweep.json").write_text(json.dumps(record))
        failed = {"status": "failed", "done": ["train"], "error": "eval: out of memory"}
        (folder / "members/model=ARMD,seed=2/member.json").write_text(json.dumps(failed))
        (folder / "members/model=wide,seed=0/member.json").unlink()
        return folder

    return make
