"""The training loop: resuming, accumulating, schedules, averages, checkpoints and fine-tuning."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import config as configs
from armd_jax import files, order
from armd_jax.cli import main as cli
from armd_jax.config import Config, OptimizerConfig, TrainingConfig
from armd_jax.core import objective, parameters
from armd_jax.data import loader
from armd_jax.errors import UserError
from armd_jax.interop.load import load
from armd_jax.training import (
    checkpoints,
    goodput,
    metrics,
    optimizer,
    placement,
    profiling,
    run_data,
    run_log,
    sharding,
    state,
    step,
    stopwatch,
    train,
    validation,
)
from armd_jax.training.state import TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _config(corpus: pathlib.Path, **training: Any) -> Config:
    values = configs.default_config_dict()
    values.data.update(path=str(corpus), tokenizer="bytes")
    values.model.update(max_length=16, num_layers=2, two_stream_layers=1, width=16, num_heads=2, positional_width=8)
    values.model.update(dropout=0.1)
    values.order.update(ar_steps=4, permute_steps=8, max_permuted=4, sbp_steps=5, streams=(1, 2))
    values.optimizer.update(learning_rate=3e-3, warmup_steps=5, ema_decay=0.9, schedule="cosine", weight_decay=0.1)
    values.training.update(num_steps=20, batch_size=4, log_every=1, eval_every=5, eval_batches=1, checkpoint_every=5)
    values.training.update(tensorboard=False)
    values.training.update(**training)
    return configs.from_config_dict(values)


def _rows(workdir: pathlib.Path) -> list[dict[str, float]]:
    """metrics.jsonl without the speed."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in run_log.SPEED} for row in rows]


def _events(workdir: pathlib.Path) -> list[tuple[str, int]]:
    rows = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    return [(row["event"], row["step"]) for row in rows if row["event"] != "spent"]


def _files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _assert_same_state(one: TrainState, other: TrainState) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b)), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus, quick_compilation) -> tuple[pathlib.Path, train.Result]:
    """A run of 20 steps; tests only read it."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    return workdir, train.train(_config(corpus), workdir, progress=False)


class _PowerCut(Exception):
    pass


def _power_cut(*_: Any) -> None:
    raise _PowerCut


@pytest.mark.slow
@pytest.mark.profiler
def test_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch, corpus, unbroken):
    """With dropout 0.1, a run that died at step 12, in a profile, and was started again ends bit for bit as one that
    never died and was not profiled. The profile of the second life is whole, and the steps of the first are lost."""
    write = metrics.MetricWriter.write

    def dying(self, number, values):
        if number == 12:
            raise _PowerCut
        write(self, number, values)

    with monkeypatch.context() as patch, pytest.raises(_PowerCut):
        patch.setattr(metrics.MetricWriter, "write", dying)
        train.train(_config(corpus, profile=(11, 5)), tmp_path / "run", progress=False)
    assert not list((tmp_path / "run" / "profile").iterdir())
    assert max(row["step"] for row in _rows(tmp_path / "run")) == 11
    resumed = train.train(_config(corpus, profile=(11, 5)), tmp_path / "run", progress=False)
    assert [trace.name for trace in (tmp_path / "run" / "profile").iterdir()] == ["step-11"]
    data = jax.profiler.ProfileData.from_file(str(profiling.newest(tmp_path / "run")))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    assert [dict(event.stats)["step_num"] for event in events if event.name == "train"] == [11, 12, 13, 14, 15]
    workdir, whole = unbroken
    assert (whole.steps_done, resumed.steps_done) == (20, 10)
    _assert_same_state(resumed.state, whole.state)
    assert _rows(tmp_path / "run") == _rows(workdir)
    spent = goodput.of(files.read_json_lines(tmp_path / "run" / "events.jsonl"))
    assert spent.processes == 2 and 1 <= spent.lost_steps <= 2 and spent.seconds["lost"] > 0
    assert [row["step"] for row in _rows(workdir) if "train/loss" in row] == list(range(1, 21))
    saves = [("save", at) for at in (5, 10, 15, 20)]
    assert _events(workdir) == [("start", 0), *saves, ("end", 20)]
    assert _events(tmp_path / "run") == [("start", 0), *saves[:2], ("resume", 10), *saves[2:], ("end", 20)]


@pytest.mark.slow
def test_a_run_goes_on_while_the_disk_is_full(tmp_path, monkeypatch, capsys, corpus, unbroken, full_disk):
    """From step 8 on nothing can be written, until the save of step 10 has failed; then the run ends as ever.

    No row is missing at the end, and only what is on disk has the event of a save.
    """
    failed = []
    read, tell_failed = loader.TrainBatches.__next__, run_log.RunLog.save_failed
    with contextlib.ExitStack() as disk:

        def reading(self):
            number, tokens_BN = read(self)
            if number == 7:
                while not (tmp_path / "run" / "checkpoints" / "5").exists():
                    time.sleep(0.01)
                disk.enter_context(full_disk(0))
            if number > 10 and failed:
                disk.close()
            elif number > 10:
                time.sleep(0.1)  # the save fails in the background
            return number, tokens_BN

        monkeypatch.setattr(loader.TrainBatches, "__next__", reading)
        monkeypatch.setattr(
            run_log.RunLog, "save_failed", lambda self, at, why: (failed.append(at), tell_failed(self, at, why))
        )
        result = train.train(_config(corpus), tmp_path / "run", progress=False)
    workdir, whole = unbroken
    _assert_same_state(result.state, whole.state)
    assert _rows(tmp_path / "run") == _rows(workdir)
    events = _events(tmp_path / "run")
    assert failed[0] == 10 and [("save_failed", at) for at in failed] == [e for e in events if e[0] == "save_failed"]
    assert [at for name, at in events if name == "save"] == [at for at in (5, 10, 15, 20) if at not in failed]
    err = capsys.readouterr().err
    assert err.count("metrics.jsonl: cannot be written (File too large)") == 1
    assert "metrics.jsonl: can be written again, and no row is missing" in err
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_resumed_denoiser_equals_an_unbroken_one(tmp_path, monkeypatch, corpus):
    """A run of model.kind=denoiser with dropout that died at step 12 ends bit for bit as one that never died."""
    config = _config(corpus)
    orders = dataclasses.replace(config.order, sbp_steps=0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, kind="denoiser"), order=orders)
    whole = train.train(config, tmp_path / "whole", progress=False)
    write = metrics.MetricWriter.write
    dying = lambda self, at, values: _power_cut() if at == 12 else write(self, at, values)  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(_PowerCut):
        patch.setattr(metrics.MetricWriter, "write", dying)
        train.train(config, tmp_path / "run", progress=False)
    resumed = train.train(config, tmp_path / "run", progress=False)
    assert (whole.steps_done, resumed.steps_done) == (20, 10)
    _assert_same_state(resumed.state, whole.state)
    rows = _rows(tmp_path / "run")
    assert rows == _rows(tmp_path / "whole")
    held_out = [row for row in rows if "eval/nll" in row]
    assert [row["step"] for row in held_out] == [5, 10, 15, 20]
    assert all(
        row.keys() == {"step", "eval/nll", "eval/nll_upper_bound", "eval/perplexity_upper_bound"} for row in held_out
    )


@pytest.mark.slow
def test_resumed_run_with_a_mix_of_orders_equals_an_unbroken_one(tmp_path, monkeypatch, corpus):
    """A run that mixes kinds of orders, with an average of the loss for each, dies and ends with the same bits."""
    config = _config(corpus, spike_nats=100.0)
    config = dataclasses.replace(config, order=dataclasses.replace(config.order, mix=("contiguous:0.4", "uniform:0.2")))
    whole = train.train(config, tmp_path / "whole", progress=False)
    assert int(np.isfinite(whole.state.loss_average).sum()) > 4 and whole.state.loss_average.shape == (3 + 2 + 1 + 1,)
    write = metrics.MetricWriter.write
    dying = lambda self, at, values: _power_cut() if at == 12 else write(self, at, values)  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(_PowerCut):
        patch.setattr(metrics.MetricWriter, "write", dying)
        train.train(config, tmp_path / "run", progress=False)
    resumed = train.train(config, tmp_path / "run", progress=False)
    assert (whole.steps_done, resumed.steps_done) == (20, 10)
    _assert_same_state(resumed.state, whole.state)
    assert _rows(tmp_path / "run") == _rows(tmp_path / "whole")
    other = dataclasses.replace(config, order=dataclasses.replace(config.order, mix=("contiguous:0.4",)))
    with pytest.raises(UserError, match=r"order\.mix was"):
        train.train(other, tmp_path / "run", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["progressive", "masked_diffusion", "contiguous"])
def test_validation_scores_what_is_trained(tmp_path, corpus, kind):
    """Diffusion blocks are scored by their bound during training, all other orders exactly and left to right."""
    config = _config(corpus, num_steps=5)
    orders = dataclasses.replace(config.order, kind=kind, diffusion_steps=1, sbp_steps=0, permute_steps=4)
    done = train.train(dataclasses.replace(config, order=orders), tmp_path / "run", progress=False)
    (row,) = (row for row in _rows(tmp_path / "run") if "eval/nll" in row)
    data, _ = run_data.prepare(done.config, tmp_path / "run", progress=False)
    ((tokens, valid),) = loader.eval_batches(data, "valid", 4, 1)
    assert valid.all()
    # In a single time step, all tokens of a row are one block.
    bounded = kind == "masked_diffusion"
    scored = order.from_blocks([list(range(16))], 4) if bounded else order.left_to_right(4, 16)
    log_probs, _ = objective.generation_log_probs(
        done.state.eval_params, done.config.model, jnp.asarray(tokens), scored
    )
    assert row["eval/nll"] == pytest.approx(-float(log_probs.mean()), rel=1e-5)
    exact = {"eval/perplexity"}
    bound = {"eval/nll_upper_bound", "eval/perplexity_upper_bound"}
    assert row.keys() == {"step", "eval/nll"} | (bound if bounded else exact)


def test_validation_takes_the_average_of_the_weights(corpus, unbroken):
    """Not the raw weights, which give another figure."""
    workdir, whole = unbroken
    data, config = run_data.prepare(whole.config, workdir, progress=False)
    evaluate = validation.Validation(placement.for_evaluation(config, sharding.make_mesh(config.mesh)), data)
    average, raw = (evaluate(params)["eval/nll"] for params in (whole.state.ema, whole.state.params))
    shown = [row["eval/nll"] for row in _rows(workdir) if "eval/nll" in row]
    assert shown[-1] == pytest.approx(average, rel=1e-6) and abs(average - raw) > 1e-4


@pytest.mark.slow
def test_every_step_and_microbatch_has_its_own_dropout(corpus):
    """The same rows lose other activations at another step, and in another part of the batch."""
    config = _config(corpus, batch_size=4)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=257, dropout=0.5))
    params = jax.jit(parameters.init, static_argnums=1)(jax.random.key(0), config.model)
    mesh = sharding.make_mesh(config.mesh)

    def nll(rows: int, microbatches: int, at: int) -> float:
        training = dataclasses.replace(config.training, batch_size=rows, microbatches=microbatches)
        placed = placement.for_training(dataclasses.replace(config, training=training), mesh)
        tokens, task = jnp.full((rows, 16), 65, jnp.int32), order.left_to_right(rows, 16)
        return float(jax.jit(lambda p: step.gradients(p, placed, tokens, task, at)[1].nll)(params))

    assert nll(2, 1, 3) == nll(2, 1, 3) != nll(2, 1, 4)
    # Four equal rows in two parts: the second part is not the first one again.
    assert abs(nll(4, 2, 3) - 2 * nll(2, 1, 3)) > 1e-3


def test_second_run_of_the_same_command_does_nothing(corpus, unbroken):
    """A complete run says that no step was left to do, and not a byte of it changes."""
    workdir, whole = unbroken
    before = _files(workdir)
    again = train.train(_config(corpus), workdir, progress=False)
    assert again.steps_done == 0
    _assert_same_state(again.state, whole.state)
    assert _files(workdir) == before


def test_another_config_cannot_continue_a_run(corpus, unbroken):
    """Another model, seed or optimizer in the same workdir is refused by the field's name; nothing changes."""
    workdir, _ = unbroken
    config, before = _config(corpus), _files(workdir)
    for section, field, value in (("model", "width", 32), ("training", "seed", 1), ("optimizer", "beta2", 0.5)):
        other = dataclasses.replace(getattr(config, section), **{field: value})
        with pytest.raises(UserError, match=f"{section}.{field} was .*, now {value}"):
            train.train(dataclasses.replace(config, **{section: other}), workdir, progress=False)
    assert _files(workdir) == before


@pytest.mark.slow
def test_damaged_newest_checkpoint_is_passed_over(tmp_path, capsys, corpus, unbroken):
    """A checkpoint cut short is skipped with an event; the run goes on from the one before and ends the same."""
    workdir, whole = unbroken
    shutil.copytree(workdir, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "20").rglob("*"):
        if file.is_file() and "state" in file.parts:
            file.write_bytes(file.read_bytes()[:3])
    mended = train.train(_config(corpus), tmp_path / "run", progress=False)
    assert mended.steps_done == 5
    _assert_same_state(mended.state, whole.state)
    assert _rows(tmp_path / "run") == _rows(workdir)
    assert [event for event in _events(tmp_path / "run") if event[0] in ("skip", "resume")] == [
        ("skip", 20),
        ("resume", 15),
    ]
    assert "checkpoint 20 is damaged" in capsys.readouterr().err
    _assert_same_state(checkpoints.restore_for_inference(tmp_path / "run", mended.config), whole.state)


@pytest.mark.slow
def test_a_run_without_a_checkpoint_may_begin_again(tmp_path, monkeypatch, corpus):
    """Where nothing was saved, another model, another tokenizer and another text may follow, and the run is then theirs
    alone. From the first checkpoint on, the model is decided."""
    config, run = _config(corpus, num_steps=5), tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(_PowerCut):
        patched.setattr(metrics.MetricWriter, "write", _power_cut)
        data = dataclasses.replace(config.data, tokenizer="sentencepiece", vocab_size=300)
        train.train(dataclasses.replace(config, data=data), run, progress=False)
    assert (run / "tokenizer" / "tokenizer.model").exists() and not any((run / "checkpoints").iterdir())
    (tmp_path / "other.jsonl").write_text(corpus.read_text().replace("river", "brook"))
    other = dataclasses.replace(config.data, path=str(tmp_path / "other.jsonl"))
    again = dataclasses.replace(config, model=dataclasses.replace(config.model, width=32), data=other)
    assert train.train(again, run, progress=False).steps_done == 5
    assert _events(run) == [("start", 0), ("start", 0), ("save", 5), ("end", 5)]
    assert load(run).config.width == 32 and load(run).tokenizer.kind == "bytes"
    with pytest.raises(UserError, match="model.width was 32, now 16"):
        train.train(dataclasses.replace(again, model=config.model), run, progress=False)


def test_no_readable_checkpoint_is_an_error(tmp_path, corpus, unbroken):
    """Where every checkpoint is damaged the run is not begun again silently."""
    shutil.copytree(unbroken[0], tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").rglob("*"):
        if file.is_file() and "state" in file.parts:
            file.write_bytes(b"")
    with pytest.raises(UserError, match="none of the checkpoints"):
        train.train(_config(corpus), tmp_path / "run", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["progressive", "masked_diffusion", "denoiser"])
def test_accumulated_gradients_equal_the_large_batch(corpus, kind):
    """Without dropout four microbatches give the gradient of the whole batch, also where tokens have weights."""
    config = _config(corpus, batch_size=8, z_loss=1e-3)
    model = dataclasses.replace(config.model, dropout=0.0, vocab_size=257)
    if kind == "denoiser":
        model, kind = dataclasses.replace(model, kind="denoiser"), "progressive"
    orders = dataclasses.replace(config.order, kind=kind, weight="simple", diffusion_steps=8, sbp_steps=0, ar_steps=0)
    config = dataclasses.replace(config, model=model, order=orders)
    params = jax.jit(parameters.init, static_argnums=1)(jax.random.key(0), model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (8, 16)), jnp.int32)
    mesh = sharding.make_mesh(config.mesh)
    drawn = step.draw_task(config, 6, 16)
    assert (float(np.ptp(drawn.weight_BN)) > 0) == (kind == "masked_diffusion" or not model.has_orders)
    results = []
    for count in (1, 4):
        training = dataclasses.replace(config.training, microbatches=count)
        cut = placement.for_training(dataclasses.replace(config, training=training), mesh)
        results.append(jax.jit(lambda p, c=cut: step.gradients(p, c, tokens, drawn, 6))(params))
    (whole, whole_sums), (summed, sums) = results
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(summed), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a) + 1e-9, jax.tree_util.keystr(path)
    for a, b in zip(jax.tree.leaves(whole_sums), jax.tree.leaves(sums), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-6)


def test_learning_rate_schedules():
    """Linear warm-up from the first step, then constant, cosine to its final fraction, or flat with a linear end."""

    def rates(**fields):
        settings = OptimizerConfig(learning_rate=1.0, warmup_steps=4, **fields)
        schedule = optimizer.learning_rate(Config(optimizer=settings, training=TrainingConfig(num_steps=24)))
        return np.array([float(schedule(at)) for at in range(25)])

    for fields in ({}, {"schedule": "cosine"}, {"schedule": "wsd"}):
        np.testing.assert_allclose(rates(**fields)[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates()[4:], 1.0)
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(21) / 20)) / 2
    np.testing.assert_allclose(rates(schedule="cosine", final_fraction=0.1)[4:], cosine, rtol=1e-5)
    all_decay = rates(schedule="wsd", decay_fraction=1.0, final_fraction=0.0)  # no longer than what warm-up leaves
    np.testing.assert_allclose(all_decay[4:], 1 - np.arange(21) / 20, atol=1e-6)
    wsd = rates(schedule="wsd", decay_fraction=0.25, final_fraction=0.0)
    np.testing.assert_allclose(wsd[4:19], 1.0)
    np.testing.assert_allclose(wsd[18:], 1 - np.arange(7) / 6, atol=1e-6)


def test_average_forgets_the_start():
    """The decay at step t is min(ema_decay, (1 + t) / (10 + t))."""
    for at, decay in ((0, 0.1), (10, 11 / 20), (10_000, 0.95)):
        config = OptimizerConfig(ema_decay=0.95)
        average = optimizer.update_ema(config, {"a": jnp.ones(2)}, {"a": jnp.zeros(2)}, jnp.int32(at))
        np.testing.assert_allclose(average["a"], decay, rtol=1e-6)


def test_average_starts_at_the_parameters(corpus):
    """In a fresh state the average equals the parameters, in buffers of its own: both are donated to the step."""
    config = _config(corpus)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=257))
    fresh = state.create(config, sharding.make_mesh(config.mesh))
    for average, param in zip(jax.tree.leaves(fresh.ema), jax.tree.leaves(fresh.params), strict=True):
        assert np.array_equal(average, param)
        assert average.unsafe_buffer_pointer() != param.unsafe_buffer_pointer()


@pytest.mark.slow
def test_weight_decay_is_for_matrices_only():
    """With zero gradients only the matrices that multiply activations shrink, by rate times weight decay."""
    model = configs.ModelConfig(vocab_size=5, max_length=4, num_layers=3, two_stream_layers=2, width=8, num_heads=2)
    model = dataclasses.replace(model, mlp="swiglu", tie_embeddings=False, positional_width=4, neighbours="both")
    params = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape), jax.eval_shape(lambda: parameters.init(jax.random.key(0), model))
    )
    tx = optimizer.make(Config(optimizer=OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.25)))
    updates = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0])(params)
    shrunk = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert np.ptp(update) == 0 and float(update.ravel()[0]) in (0.0, -0.125)
        if update.ravel()[0]:
            shrunk.add(path[-1].key)
    layers = {"query", "key_value", "attention_out", "mlp_in", "mlp_gate", "mlp_out"}
    assert shrunk == layers | {"left", "right", "head"}


@pytest.mark.slow
@pytest.mark.parametrize("died", [False, True], ids=["at once", "again after a death before the first checkpoint"])
def test_fine_tuning_starts_from_the_weights_of_another_run(
    tmp_path, monkeypatch, smoke_run, smoke_config, corpus, died
):
    """The first loss of a run with `training.init_from` and another order is that of the weights it came from."""
    workdir = tmp_path / "run"
    command = ["train", f"--config={smoke_config}", f"--workdir={workdir}", f"--config.data.path={corpus}"]
    command += [f"--config.training.init_from={smoke_run}", "--config.order.kind=uniform", "--config.order.sbp_steps=0"]
    command += ["--config.training.num_steps=2", "--config.optimizer.learning_rate=1e-9"]
    if died:
        with monkeypatch.context() as patched, pytest.raises(_PowerCut):
            patched.setattr(metrics.MetricWriter, "write", _power_cut)
            cli.main(command)
        assert (workdir / "config.json").exists() and not any((workdir / "checkpoints").iterdir())
    assert cli.main(command) == 0
    lm, config = load(smoke_run), configs.read(workdir)
    data, _ = run_data.prepare(config, workdir, progress=False)
    with loader.train_batches(data, config.training.batch_size, config.training.seed) as batches:
        _, tokens = next(batches)
    expected = -float(np.mean(lm.log_prob(tokens, step.draw_task(config, 0, tokens.shape[1]))))
    first = _rows(workdir)[0]
    assert first["step"] == 1 and first["train/nll"] == pytest.approx(expected, rel=1e-4)
    untrained = float(np.log(lm.config.vocab_size))
    assert -float(np.mean(lm.log_prob(tokens, order.left_to_right(*tokens.shape)))) < untrained - 1


@pytest.mark.parametrize(("field", "value"), [("width", 16), ("two_stream_layers", 0), ("aggregator", "mean")])
def test_fine_tuning_needs_the_same_model(tmp_path, monkeypatch, capsys, smoke_run, smoke_config, corpus, field, value):
    """Weights of another model are refused by the name of the field that differs, before hours of preparing text."""
    monkeypatch.setattr(run_data, "prepare", lambda *_: pytest.fail("text was prepared"))
    command = ["train", f"--config={smoke_config}", f"--workdir={tmp_path / 'run'}", f"--config.data.path={corpus}"]
    assert cli.main([*command, f"--config.training.init_from={smoke_run}", f"--config.model.{field}={value}"]) == 2
    assert f"model.{field}" in capsys.readouterr().err.splitlines()[-1]


def test_fine_tuning_needs_the_same_vocabulary(tmp_path, monkeypatch, capsys, smoke_run, smoke_config, corpus):
    """A tokenizer that cannot be that of the weights is refused before hours of preparing text, with what to set."""
    monkeypatch.setattr(run_data, "prepare", lambda *_: pytest.fail("text was prepared"))
    command = ["train", f"--config={smoke_config}", f"--workdir={tmp_path / 'run'}", f"--config.data.path={corpus}"]
    command += [f"--config.training.init_from={smoke_run}", "--config.data.tokenizer=sentencepiece"]
    assert cli.main([*command, "--config.data.vocab_size=257"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "another vocabulary" in last and last.endswith(f"set data.tokenizer={smoke_run / 'tokenizer'}")


@pytest.mark.slow
def test_fine_tuning_with_a_vocabulary_that_is_trained_again(tmp_path, capsys, smoke_config, corpus):
    """On little text it has fewer tokens than asked for, and is the same again."""
    command = ["train", f"--config={smoke_config}", f"--config.data.path={corpus}", "--config.training.num_steps=2"]
    command += ["--config.data.tokenizer=sentencepiece", "--config.data.vocab_size=4000", "--config.order.sbp_steps=0"]
    assert cli.main([*command, f"--workdir={tmp_path / 'first'}"]) == 0
    size = configs.read(tmp_path / "first").model.vocab_size
    assert 257 < size < 4000
    again = [*command, f"--workdir={tmp_path / 'second'}", f"--config.training.init_from={tmp_path / 'first'}"]
    assert cli.main(again) == 0
    assert cli.main([*again[:-2], f"--workdir={tmp_path / 'third'}", again[-1], "--config.data.vocab_size=300"]) == 2
    assert "another vocabulary" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_a_run_is_not_continued_on_other_text(tmp_path, capsys, corpus, smoke_config, tokenizer):
    """Where the files that `data.path` names have changed, nothing is trained and the run stays as it is; with the old
    text back it goes on. A tokenizer trained on the text would give its ids other meanings."""
    text, run = tmp_path / "text.jsonl", tmp_path / "run"
    shutil.copy(corpus, text)
    command = ["train", f"--config={smoke_config}", f"--workdir={run}", f"--config.data.path={text}"]
    command += [f"--config.data.tokenizer={tokenizer}", "--config.data.vocab_size=300"]
    assert cli.main([*command, "--config.training.num_steps=2", "--config.order.sbp_steps=0"]) == 0
    command += ["--config.training.num_steps=4", "--config.order.sbp_steps=0"]
    before = _files(run)
    with text.open("a") as file:
        file.writelines(json.dumps({"text": f"zebra {number} quartz"}) + "\n" for number in range(40))
    capsys.readouterr()
    assert cli.main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and ("another tokenizer" if tokenizer != "bytes" else "other rows") in last
    after = _files(run)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("data/") for name in after.keys() - before.keys())
    shutil.copy(corpus, text)
    assert cli.main(command) == 0
    assert ("resume", 2) in _events(run)


def test_the_rate_is_of_training_alone(monkeypatch):
    """Tokens a second leave out what an evaluation between two rows took; every row but the first has them."""
    now = [0.0]
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: now[0])
    config = configs.from_config_dict({"training": {"batch_size": 2, "log_every": 1, "tensorboard": False}})
    log, rates = run_log.RunLog(config, False, stopwatch.Stopwatch()), []
    with contextlib.ExitStack() as stack:
        log.open(stack, None, 0, 0)
        log._writer = types.SimpleNamespace(write=lambda _, values: rates.append(values.get("train/tokens_per_second")))
        for done in (1, 2, 3):
            log.read(done, {"train/loss": 1.0, "train/grad_norm": 1.0, "train/skipped": 0.0})
            now[0] += 2.0
            log.flush()
            if done == 2:
                now[0] += 100.0
                log.evaluated(done, {})
    tokens = 2 * config.model.max_length
    assert rates == [None, tokens / 2.0, tokens / 2.0]


def test_evaluation_takes_the_whole_batch_at_once(corpus):
    """Its chunk of logits is sized for the batch on a device, and not for a microbatch."""
    config = _config(corpus, batch_size=4096, microbatches=2048)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=257, max_length=256))
    devices = types.SimpleNamespace(flat=jax.devices())
    mesh = types.SimpleNamespace(size=2, shape={"data": 2, "fsdp": 1, "tensor": 1}, devices=devices)
    whole, part = placement.for_evaluation(config, mesh), placement.for_training(config, mesh)
    assert (whole.config.model.loss_chunk, part.config.model.loss_chunk) == (objective.loss_chunk(2048 * 384, 256), 256)
    assert whole.config.model.loss_chunk < 256
