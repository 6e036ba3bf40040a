"""Updates that must not be made: skipped, counted, rolled back, reported."""

import dataclasses
import json
import os
import pathlib
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import config as configs
from armd_jax.cli import main as cli
from armd_jax.config import Config
from armd_jax.core import task as tasks
from armd_jax.data import loader
from armd_jax.training import checkpoints, faults, optimizer, placement, run_data, sharding, state, step, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

NO_TOKEN = 10**6  # beyond every vocabulary: its log-probability is NaN


def _config(corpus: pathlib.Path, **training: Any) -> Config:
    values = configs.default_config_dict()
    values.data.update(path=str(corpus), tokenizer="bytes")
    values.model.update(max_length=16, num_layers=2, two_stream_layers=1, width=16, num_heads=2, positional_width=8)
    values.order.update(ar_steps=4, permute_steps=8, max_permuted=4)
    values.optimizer.update(learning_rate=3e-3, warmup_steps=2, ema_decay=0.9)
    values.training.update(num_steps=16, batch_size=4, log_every=1, eval_every=0, checkpoint_every=4, max_skipped=3)
    values.training.update(tensorboard=False)
    values.training.update(**training)
    return configs.from_config_dict(values)


@pytest.fixture
def poisoned(monkeypatch) -> set[int]:
    """The batches of the steps in this set (counted from 0) hold a token that does not exist, in row 2."""
    steps: set[int] = set()
    read = loader.TrainBatches.__next__

    def reading(self):
        number, tokens_BN = read(self)
        if number in steps:
            tokens_BN = tokens_BN.copy()
            tokens_BN[2, 5] = NO_TOKEN
        return number, tokens_BN

    monkeypatch.setattr(loader.TrainBatches, "__next__", reading)
    return steps


def _events(workdir: pathlib.Path) -> list[tuple[str, int]]:
    rows = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    return [(row["event"], row["step"]) for row in rows if row["event"] != "spent"]


def _rows(workdir: pathlib.Path) -> dict[int, dict[str, float | None]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row.pop("step"): row for row in rows}


def _same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def _device_state(config: Config) -> tuple[Any, state.TrainState, Any]:
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=257))
    mesh = sharding.make_mesh(config.mesh)
    return config, state.create(config, mesh), mesh


def test_a_skipped_update_changes_no_bit(corpus):
    """After a NaN the parameters, average and moments are what they were, bit for bit; a good batch changes them."""
    config, now, mesh = _device_state(_config(corpus))
    train_step = step.make_train_step(placement.for_training(config, mesh))
    good = jnp.asarray(np.random.default_rng(0).integers(0, 257, (4, 16)), jnp.int32)
    now, _ = train_step(now, good)
    before = jax.tree.map(np.array, (now.params, now.ema, now.opt_state, now.loss_average))
    now, metrics = train_step(now, good.at[2, 5].set(NO_TOKEN))
    assert np.isnan(metrics["train/loss"]) and (int(metrics["train/skipped"]), int(now.step)) == (1, 2)
    assert _same((now.params, now.ema, now.opt_state, now.loss_average), before)
    now, metrics = train_step(now, good)
    assert np.isfinite(metrics["train/loss"]) and (int(now.skipped), int(now.step)) == (0, 3)
    for after, earlier in zip((now.params, now.ema, now.opt_state), before, strict=False):
        assert not _same(after, earlier)


def test_a_gradient_that_is_not_finite_is_no_update(corpus):
    """With a finite loss: here the squares of the gradient overflow, as in a model whose logits have exploded."""
    config = _config(corpus)
    config, now, mesh = _device_state(
        dataclasses.replace(config, model=dataclasses.replace(config.model, tie_embeddings=False))
    )
    now = dataclasses.replace(now, params=now.params | {"head": now.params["head"] * 1e25})
    before = jax.tree.map(np.array, (now.params, now.ema, now.opt_state, now.loss_average))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (4, 16)), jnp.int32)
    after, metrics = step.make_train_step(placement.for_training(config, mesh))(now, tokens)
    assert np.isfinite(metrics["train/loss"]) and not np.isfinite(metrics["train/grad_norm"])
    assert (int(metrics["train/skipped"]), int(after.step)) == (1, 1)
    assert _same((after.params, after.ema, after.opt_state, after.loss_average), before)


def test_a_spike_is_skipped_where_the_config_says_so(corpus):
    """A finite loss far above the running average is no update; without `spike_nats` it is."""
    for nats, expected in ((0.0, 0), (0.5, 1)):
        config, now, mesh = _device_state(_config(corpus, spike_nats=nats))
        train_step = step.make_train_step(placement.for_training(config, mesh))
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (4, 16)), jnp.int32)
        now, metrics = train_step(now, tokens)
        usual = float(metrics["train/loss"])
        assert int(metrics["train/skipped"]) == 0 and float(now.loss_average.ravel()[0]) == usual
        now = dataclasses.replace(now, loss_average=jnp.full_like(now.loss_average, usual - 1))
        now, metrics = train_step(now, tokens)
        assert float(metrics["train/loss"]) > usual - 0.5 and int(metrics["train/skipped"]) == expected


def test_a_loss_is_a_spike_among_its_own_kind(corpus):
    """With eight streams a loss is naturally higher than with one: the first such step is made, and sets their average.

    Otherwise a whole phase of strided orders could be skipped.
    """
    config = _config(corpus, spike_nats=0.5)
    orders = dataclasses.replace(config.order, sbp_steps=12, streams=(1, 8))
    config, now, mesh = _device_state(dataclasses.replace(config, order=orders))
    drawn = [int(tasks.of(config).kind(step._key(config, step._TASK, jnp.int32(at)), at)) for at in range(16)]
    assert drawn[:4] == [0] * 4 and set(drawn[4:]) == {3, 4}  # kinds 1 and 2 would be the other phases
    train_step = step.make_train_step(placement.for_training(config, mesh))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (4, 16)), jnp.int32)
    now, metrics = train_step(dataclasses.replace(now, step=jnp.int32(drawn.index(3))), tokens)
    usual = float(metrics["train/loss"])
    assert [float(average) for average in now.loss_average] == [np.inf] * 3 + [usual, np.inf]
    low = now.loss_average.at[3].set(usual - 1)
    for kind, skipped in ((4, 0), (3, 1)):
        at = dataclasses.replace(jax.tree.map(jnp.copy, now), step=jnp.int32(drawn.index(kind)), loss_average=low + 0)
        after, metrics = train_step(at, tokens)
        assert int(metrics["train/skipped"]) == skipped
        assert bool(jnp.isfinite(after.loss_average[4])) == (kind == 4) and float(after.loss_average[3]) == usual - 1


def test_the_run_goes_on_after_a_skipped_update(tmp_path, capsys, corpus, poisoned):
    """One bad batch is counted, logged and told; its row has no number where there is none; training ends well."""
    poisoned.add(5)
    result = train.train(_config(corpus), tmp_path / "run", progress=False)
    assert int(result.state.step) == 16 and int(result.state.skipped) == 0
    assert ("skip_update", 6) in _events(tmp_path / "run")
    rows = _rows(tmp_path / "run")
    assert rows[6]["train/loss"] is None and rows[6]["train/skipped"] == 1
    assert rows[7]["train/loss"] > 0 and rows[7]["train/skipped"] == 0
    assert "step 6: the update was skipped" in capsys.readouterr().err
    assert not (tmp_path / "run" / "faults").exists()


def test_rollback_to_the_last_good_checkpoint(tmp_path, corpus, poisoned):
    """More than `max_skipped` in a row: the last checkpoint from before, the batches after; the report names all."""
    config = _config(corpus)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule="cosine"))
    poisoned.update(range(6, 10))  # updates 7 to 10; the run finds out while update 11 is under way
    result = train.train(config, tmp_path / "run", progress=False)
    rate = optimizer.learning_rate(config)
    for at, row in _rows(tmp_path / "run").items():  # as if nothing had been skipped: the cosine reaches its end
        assert row["train/learning_rate"] == pytest.approx(float(rate(at - 1)), rel=1e-5)
    assert ("rollback", 11) in _events(tmp_path / "run")
    report = json.loads((tmp_path / "run" / "faults" / "step-7.json").read_text())
    assert (report["first_step"], report["last_step"]) == (7, 10)
    assert report["first_non_finite"] == {"tensor": "nll", "rows": [2], "positions": [5]}
    data, resolved = run_data.prepare(config, tmp_path / "run", progress=False)
    rows = {str(at + 1): loader.batch_rows(data, at, 4, 0)[1].tolist() for at in range(6, 10)}
    assert report["batch_rows"] == rows

    # The same by hand: the state of step 4, then the batches from the twelfth on.
    mesh = sharding.make_mesh(config.mesh)
    now, train_step = state.create(resolved, mesh), step.make_train_step(placement.for_training(resolved, mesh))
    with loader.train_batches(data, 4, 0) as batches:
        for number, tokens in batches:
            if number == 4:
                now = dataclasses.replace(now, step=jnp.int32(11))
            if number < 4 or number >= 11:
                now, _ = train_step(now, jnp.asarray(tokens))
            if number == 15:
                break
    assert _same(now, result.state)


def test_a_rollback_passes_over_the_checkpoint_of_a_stop(tmp_path, monkeypatch, corpus, poisoned):
    """A run that a signal stopped on the way goes back to where an unbroken one does, and ends with the same bits.

    Skipped updates are counted anew from the rollback on.
    """
    config, read = _config(corpus), loader.TrainBatches.__next__

    def stopping(self):
        number, tokens_BN = read(self)
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return number, tokens_BN

    with monkeypatch.context() as patched:
        patched.setattr(loader.TrainBatches, "__next__", stopping)
        stopped = train.train(config, tmp_path / "stopped", progress=False)
    assert stopped.stopped and int(stopped.state.step) == 6
    poisoned.update(range(6, 14))  # three of them after the rollback, which is not too many to go on
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "faults").write_text("")  # the report cannot be written, which ends no run
    results = [train.train(config, tmp_path / name, progress=False) for name in ("stopped", "whole")]
    for name in ("stopped", "whole"):
        rows = [json.loads(line) for line in (tmp_path / name / "events.jsonl").read_text().splitlines()]
        assert [(row["step"], row["to"]) for row in rows if row["event"] == "rollback"] == [(11, 4)]
    assert rows[-1]["event"] == "end" and ("save", 6) in _events(tmp_path / "stopped")
    assert _same(*(result.state for result in results))


def test_the_checkpoint_to_go_back_to_is_kept(tmp_path, corpus, poisoned):
    """However few checkpoints a run keeps: none is made while updates are skipped, and those of stops push none out."""
    config = _config(corpus, checkpoint_every=2, keep_checkpoints=1)
    poisoned.update(range(6, 10))
    train.train(config, tmp_path / "run", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(row["step"], row["to"]) for row in rows if row["event"] == "rollback"] == [(11, 6)]
    assert [row["step"] for row in rows if row["event"] == "save"] == [2, 4, 6, 12, 14, 16]

    config, now, _ = _device_state(config)
    with checkpoints.Checkpointer(tmp_path / "stopped", config) as checkpointer:
        for at in (2, 4, 5, 7):
            now = dataclasses.replace(now, step=jnp.int32(at))
            assert checkpointer.save(now, at, force=at % 2 == 1)
        checkpointer.wait()
        assert checkpointer.steps() == [4, 7]


def test_no_way_on_is_an_error_with_a_report(tmp_path, corpus, poisoned):
    """Where nothing goes well after a rollback, where no checkpoint is old enough, and where the config says stop."""
    poisoned.update(range(6, 40))
    with pytest.raises(faults.RunFailed, match=r"every update since the rollback at step 11 was skipped.*faults"):
        train.train(_config(corpus, num_steps=40), tmp_path / "a", progress=False)
    poisoned.update(range(40))
    with pytest.raises(faults.RunFailed, match="no checkpoint is older"):
        train.train(_config(corpus), tmp_path / "b", progress=False)
    with pytest.raises(faults.RunFailed, match="updates 1 to 4 were all skipped"):
        train.train(_config(corpus, after_skipped="stop"), tmp_path / "c", progress=False)
    assert json.loads((tmp_path / "c" / "faults" / "step-1.json").read_text())["first_step"] == 1


def test_first_non_finite_tensor_is_named(corpus):
    """A parameter that is not finite comes before what follows from it; a step without a fault names none."""
    config, now, mesh = _device_state(_config(corpus))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (4, 16)), jnp.int32)
    assert faults.first_non_finite(placement.for_training(config, mesh), now, tokens) == {"tensor": "none"}
    params = now.params | {
        "causal": now.params["causal"] | {"mlp_in": now.params["causal"]["mlp_in"].at[0, 0, 0].set(jnp.inf)}
    }
    found = faults.first_non_finite(
        placement.for_training(config, mesh), dataclasses.replace(now, params=params), tokens
    )
    assert found == {"tensor": "parameter causal.mlp_in"}


def test_debug_nans_stops_at_the_operation(tmp_path, capsys, corpus, smoke_config, poisoned):
    """`--debug-nans` ends with one error line and exit code 1; without a fault it only costs time."""
    command = ["train", f"--config={smoke_config}", f"--config.data.path={corpus}", "--debug-nans"]
    command += ["--config.training.num_steps=3", "--config.order.sbp_steps=0"]
    assert cli.main([*command, f"--workdir={tmp_path / 'good'}"]) == 0
    poisoned.add(1)
    assert cli.main([*command, f"--workdir={tmp_path / 'bad'}"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: step 2: invalid value (nan) encountered in gather, core/objective.py:")
    assert "'rows': [2], 'positions': [5]" in last
