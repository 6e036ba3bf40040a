"""The training loop, top to bottom: data, mesh, state, restore, steps."""

import contextlib
import dataclasses
import logging
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from armd_jax import config as configs
from armd_jax.config import Config, UserError
from armd_jax.core.network import Params
from armd_jax.data import loader, packing
from armd_jax.data.packing import PreparedData
from armd_jax.training import checkpoints, host_memory, sharding, step
from armd_jax.training import state as states
from armd_jax.training.metrics import MetricWriter, write_atomically
from armd_jax.training.state import TrainState

# What may differ between a run and its continuation; anything else would make it another run.
_MAY_CHANGE = {
    "training": {
        "num_steps",
        "log_every",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "tensorboard",
        "wandb_project",
    },
    "data": {"cache_dir", "tfds_data_dir"},
    "model": {"scan_layers", "remat", "attention", "attention_chunk", "loss_chunk"},
    "mesh": {"data", "fsdp", "tensor"},
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training call did. `steps_done` is 0 where the run was complete already."""

    state: TrainState
    config: Config
    steps_done: int


def prepare_data(config: Config, workdir: pathlib.Path, progress: bool = True) -> tuple[PreparedData, Config]:
    """The prepared data of the config (made now where it is not there yet) and the config with its vocabulary size."""
    root = pathlib.Path(config.data.cache_dir) if config.data.cache_dir else workdir / "data"
    data = packing.prepare(config.data, config.model.max_length, root, progress=progress)
    return data, with_vocabulary(config, data)


def with_vocabulary(config: Config, data: PreparedData) -> Config:
    """The config with the tokenizer's vocabulary size; UserError where it names another."""
    size = data.tokenizer.vocab_size
    if config.model.vocab_size not in (0, size):
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the data's tokenizer has {size}; leave it at 0"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def check_continuation(old: Config, new: Config, workdir: pathlib.Path) -> None:
    """Raises UserError where `new` cannot continue the run of `old`, naming every field that differs."""
    if not new.model.vocab_size:  # not resolved yet: it follows from the data, which are compared here
        new = dataclasses.replace(new, model=dataclasses.replace(new.model, vocab_size=old.model.vocab_size))
    wrong = []
    for section in dataclasses.fields(Config):
        before, after = getattr(old, section.name), getattr(new, section.name)
        for field in dataclasses.fields(before):
            was, now = getattr(before, field.name), getattr(after, field.name)
            if was != now and field.name not in _MAY_CHANGE.get(section.name, ()):
                wrong.append(f"{section.name}.{field.name} was {was!r}, now {now!r}")
    if wrong:
        raise UserError(f"{workdir} holds a run of another config ({'; '.join(wrong)}): use another --workdir")


def train(
    config: Config,
    workdir: pathlib.Path,
    initial_params: Params | None = None,
    progress: bool = True,
) -> Result:
    """Trains to `training.num_steps`, continuing what is in `workdir`. Raises UserError where the input cannot work.

    initial_params: weights to start from where the run is new (fine-tuning).
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every save in several lines
    workdir = workdir.absolute()

    # --- config and data -----------------------------------------------------------------------------------------
    old = checkpoints.read_config(workdir) if (workdir / "config.json").exists() else None
    _check_writable(workdir)
    mesh = sharding.make_mesh(config.mesh)
    if mesh.devices.flat[0].platform == "cpu":
        host_memory.keep_freed_memory()
    if old is not None:
        check_continuation(old, config, workdir)
    data, config = prepare_data(config, workdir, progress)
    sharding.check_divisible(config, mesh)

    # --- state: the newest checkpoint, else given weights, else random ones ----------------------------------------
    primary = jax.process_index() == 0
    skipped: list[tuple[int, str]] = []
    with contextlib.ExitStack() as stack:
        if primary:
            workdir.mkdir(parents=True, exist_ok=True)
            data.tokenizer.save(workdir / "tokenizer")
            write_atomically(workdir / "config.json", configs.to_json(config))
        checkpointer = stack.enter_context(checkpoints.Checkpointer(workdir, config))
        state = checkpointer.restore_newest(states.abstract(config, mesh), lambda at, why: skipped.append((at, why)))
        resumed = state is not None
        if state is None:
            state = states.create(config, mesh, initial_params)
        first_step, last_step = int(state.step), config.training.num_steps
        if first_step >= last_step:
            return Result(state, config, 0)

        # --- what the run writes -----------------------------------------------------------------------------------
        writer = None
        if primary:
            writer = MetricWriter(workdir, config, first_step)
            stack.callback(writer.close)
            for at, why in skipped:
                print(f"checkpoint {at} is damaged and was skipped: {why}", file=sys.stderr)
                writer.event("skip", at, reason=why)
            writer.event("resume" if resumed else "start", first_step, time=time.time())

        # --- steps -----------------------------------------------------------------------------------------------
        train_step = step.make_train_step(config, mesh)
        evaluate = _Evaluation(config, mesh, data)
        tokens_a_step = config.training.batch_size * config.model.max_length
        bar = stack.enter_context(
            tqdm(
                total=last_step,
                initial=first_step,
                unit="step",
                disable=not (progress and primary),
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10.0,
            )
        )
        log = _Log(config, writer, bar, tokens_a_step)
        batches = stack.enter_context(_global_batches(config, data, mesh, first_step))
        for number, tokens_BN in batches:
            done = number + 1
            state, metrics = train_step(state, tokens_BN)
            log.read(done, metrics)
            if config.training.eval_every and (done % config.training.eval_every == 0 or done == last_step):
                values = evaluate(state.eval_params)
                log.flush()
                log.evaluated(done, values)
            if checkpointer.save(state, done) or (done == last_step and checkpointer.save_last(state, done)):
                log.flush()
                if writer:
                    writer.event("save", done)
            bar.update()
            if done == last_step:
                break
        log.flush()
        if writer:
            writer.event("end", last_step, time=time.time())
    return Result(state, config, last_step - first_step)


def _check_writable(workdir: pathlib.Path) -> None:
    """Raises UserError where the workdir could not be written, without creating anything."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file, not a folder")
    existing = next(parent for parent in (workdir, *workdir.parents) if parent.exists())
    probe = existing / f".armd-probe-{time.time_ns()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def _global_batches(config: Config, data: PreparedData, mesh: Mesh, first: int) -> Iterator[Iterator]:
    """Batches from step `first` on as global arrays; each process loads its own rows only."""
    rows = sharding.batch_sharding(mesh)
    shape = (config.training.batch_size, config.model.max_length)
    with loader.train_batches(
        data,
        config.training.batch_size,
        config.training.seed,
        first,
        num_processes=jax.process_count(),
        process_index=jax.process_index(),
    ) as batches:
        yield ((n, jax.make_array_from_process_local_data(rows, tokens, shape)) for n, tokens in batches)


class _Log:
    """Reads the metrics of a step after the next one was dispatched, so that the device never waits for the host."""

    def __init__(self, config: Config, writer: MetricWriter | None, bar: tqdm, tokens_a_step: int) -> None:
        self._every, self._last = config.training.log_every, config.training.num_steps
        self._writer, self._bar, self._tokens = writer, bar, tokens_a_step
        self._pending: tuple[int, step.Metrics] | None = None
        self._clock: tuple[int, float] | None = None
        self._shown: dict[str, str] = {}

    def read(self, done: int, metrics: step.Metrics) -> None:
        self.flush()
        self._pending = (done, metrics)

    def flush(self) -> None:
        """Writes the row that is due, if any."""
        if self._pending is None:
            return
        (done, metrics), self._pending = self._pending, None
        if done % self._every and done not in (1, self._last):
            return
        values = {name: float(value) for name, value in metrics.items()}  # waits until the device is done
        now = time.perf_counter()
        if self._clock is not None and done > self._clock[0]:  # the first row holds the compilation: no rate
            values["train/tokens_per_second"] = (done - self._clock[0]) * self._tokens / (now - self._clock[1])
            self._shown["tokens/s"] = f"{values['train/tokens_per_second']:,.0f}"
        self._clock = (done, now)
        self._shown["loss"] = f"{values['train/loss']:.4f}"
        self._bar.set_postfix(self._shown, refresh=False)
        if self._writer:
            self._writer.write(done, values)

    def evaluated(self, done: int, values: dict[str, float]) -> None:
        self._clock = None  # the rate is of training alone
        if values:
            self._shown["eval"] = f"{values['eval/nll']:.4f}"
            self._bar.set_postfix(self._shown, refresh=False)
            if self._writer:
                self._writer.write(done, values)


class _Evaluation:
    """Exact left-to-right loss on the first batches of the validation split."""

    def __init__(self, config: Config, mesh: Mesh, data: PreparedData) -> None:
        self._config, self._mesh, self._data = config, mesh, data
        self._step = step.make_eval_step(config, mesh)

    def __call__(self, params: Params) -> dict[str, float]:
        if "valid" not in self._data.splits:
            return {}
        rows = sharding.batch_sharding(self._mesh)
        training = self._config.training
        share = training.batch_size // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        shape = (training.batch_size, self._config.model.max_length)
        nll = tokens = 0.0
        limit = training.eval_batches or None
        for batch, valid in loader.eval_batches(self._data, "valid", training.batch_size, limit):
            arrays = (jax.make_array_from_process_local_data(rows, np.asarray(a[mine]), shape) for a in (batch, valid))
            sums = self._step(params, *arrays)
            nll, tokens = nll + float(sums.nll), tokens + float(sums.tokens)
        return {"eval/nll": nll / tokens, "eval/perplexity": float(np.exp(nll / tokens))}
