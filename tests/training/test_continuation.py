"""A run that goes on with another number of steps: what jumps is said, refused, or rises from where it was."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from armd_jax import config as configs
from armd_jax.config import Config
from armd_jax.errors import UserError
from armd_jax.training import continuation, metrics, optimizer, train
from armd_jax.training.optimizer import Rewarm

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _config(steps: int, sbp_steps: int = 0, **fields: object) -> Config:
    values = configs.default_config_dict()
    values.optimizer.update(learning_rate=1.0, warmup_steps=4, **fields)
    values.order.update(ar_steps=2, permute_steps=6, max_permuted=4, sbp_steps=sbp_steps, streams=(1, 2))
    values.model.max_length = 16
    values.training.num_steps = steps
    return configs.from_config_dict(values)


COSINE, WSD = {"schedule": "cosine"}, {"schedule": "wsd", "decay_fraction": 0.25}


@pytest.mark.parametrize(
    ("fields", "was", "now", "step", "jumps"),
    [
        (COSINE, 20, 40, 20, True),  # complete: from the end of one cosine into the middle of the other
        (COSINE, 20, 40, 10, True),
        (COSINE, 20, 40, 3, False),  # both warm up
        (COSINE, 3, 40, 3, False),  # complete, and still in its warm-up: the next step has a higher rate in any case
        (COSINE, 20, 20, 10, False),
        (COSINE, 40, 20, 10, False),  # it falls
        (COSINE, 1000, 1010, 500, False),  # by less than a tenth
        (WSD, 20, 40, 20, True),
        (WSD, 20, 40, 14, False),  # before the rate falls
        (WSD, 20, 40, 18, True),
        ({}, 20, 40, 20, False),
        (COSINE, 20, 10, 20, False),  # nothing is left to do
    ],
)
def test_what_jumps_is_refused_without_a_flag(tmp_path, fields, was, now, step, jumps):
    """The error names the step and both rates; `--rewarm=0` lets the rate jump, another number lets it rise."""
    old, new = _config(was, **fields), _config(now, **fields)
    if not jumps:
        going_on = continuation.of(tmp_path, old, new, step, None)
        assert going_on.rewarm is None and not going_on.fresh
        assert continuation.of(tmp_path, old, new, step, 5) == going_on
        assert bool(going_on.changes) == (now < was and step < now or was == 1000)
        return
    rates = [optimizer.learning_rate(config) for config in (old, new)]
    before, after = float(rates[0](min(step, was - 1))), float(rates[1](step))
    jump = rf"at step {step} the learning rate would jump from {before:.3g} to {after:.3g}; give --rewarm"
    with pytest.raises(UserError, match=jump):
        continuation.of(tmp_path, old, new, step, None)
    leap = continuation.of(tmp_path, old, new, step, 0)
    assert leap.rewarm is None and leap.changes.endswith(f"goes from {before:.3g} to {after:.3g}")
    assert continuation.of(tmp_path, old, new, step, 5).rewarm == Rewarm(step, 5, before)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_phases_that_change_are_said(tmp_path):
    """A run that ended with strided orders goes back to its other ones, and strided orders move to the new end."""
    going_on = continuation.of(tmp_path, _config(20, sbp_steps=5), _config(40, sbp_steps=5), 20, None)
    assert going_on.changes == "training.num_steps was 20, now 40: orders go from the phase 'SBP' to 'constant'"
    assert continuation.of(tmp_path, _config(20, sbp_steps=5), _config(40, sbp_steps=5), 10, None).changes == ""


def test_the_second_warm_up_rises_from_where_the_rate_was():
    """Linearly, to the rate that the schedule has by then; before and after it, nothing is different."""
    config = _config(40, schedule="cosine")
    plain, rewarmed = (optimizer.learning_rate(config, rewarm) for rewarm in (None, Rewarm(20, 5, 0.01)))
    expected = np.array([float(plain(at)) for at in range(40)])
    for number in range(4):
        expected[20 + number] = 0.01 + (number + 1) / 5 * (expected[20 + number] - 0.01)
    np.testing.assert_allclose([float(rewarmed(at)) for at in range(40)], expected, rtol=1e-6)


def test_a_damaged_file_is_a_user_error(tmp_path):
    """It is named, as every file of a run that came from elsewhere."""
    for content in ("{", "[]", '{"step": 1, "steps": "many", "rate": 1.0}', '{"step": 1}'):
        (tmp_path / "rewarm.json").write_text(content)
        with pytest.raises(UserError, match=r"rewarm\.json"):
            continuation.of(tmp_path, _config(20), _config(20), 10, None)


@pytest.mark.slow
def test_a_rewarmed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys, corpus):
    """Without the flag it is refused and stays as it is. With it the rate has no jump, and a crash changes no bit."""

    def config(steps: int) -> Config:
        values = configs.default_config_dict()
        values.data.update(path=str(corpus), tokenizer="bytes")
        values.model.update(max_length=16, num_layers=2, two_stream_layers=1, width=16, num_heads=2)
        values.model.positional_width = 8
        values.order.update(ar_steps=4, permute_steps=8, max_permuted=4)
        values.optimizer.update(learning_rate=3e-3, warmup_steps=2, ema_decay=0.9, schedule="cosine")
        values.training.update(num_steps=steps, batch_size=4, log_every=1, eval_every=0, checkpoint_every=4)
        values.training.update(tensorboard=False)
        return configs.from_config_dict(values)

    def files(run: pathlib.Path) -> dict[str, bytes]:
        return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}

    def rows(run: pathlib.Path) -> list[dict[str, float]]:
        found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{name: row[name] for name in ("step", "train/loss", "train/learning_rate")} for row in found]

    runs = [tmp_path / "whole", tmp_path / "broken"]
    for run in runs:
        train.train(config(8), run, progress=False)
        before = files(run)
        with pytest.raises(UserError, match=r"at step 8 the learning rate would jump from .* to .*--rewarm=STEPS"):
            train.train(config(16), run, progress=False)
        assert files(run) == before
    write = metrics.MetricWriter.write

    def dying(self, number, values):
        if number == 14:
            raise KeyboardInterrupt
        write(self, number, values)

    capsys.readouterr()
    whole = train.train(config(16), runs[0], progress=False, rewarm_steps=6)
    told = "step 8: training.num_steps was 8, now 16: the learning rate goes from "
    assert told in capsys.readouterr().err
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(metrics.MetricWriter, "write", dying)
        train.train(config(16), runs[1], progress=False, rewarm_steps=6)
    train.train(config(16), runs[1], progress=False)  # the same command, with or without the flag
    assert rows(runs[0]) == rows(runs[1]) and whole.steps_done == 8
    rates = [row["train/learning_rate"] for row in rows(runs[0])]
    plain = optimizer.learning_rate(config(16))
    assert rates[7] < rates[8] < rates[9] < float(plain(9)) and rates[15] == pytest.approx(float(plain(15)), rel=1e-5)
    changes = [json.loads(line).get("changes") for line in (runs[0] / "events.jsonl").read_text().splitlines()]
    assert [text for text in changes if text and text.endswith(" over 6 steps")]
    assert dataclasses.asdict(Rewarm(8, 6, 0.0)).keys() == json.loads((runs[0] / "rewarm.json").read_text()).keys()
