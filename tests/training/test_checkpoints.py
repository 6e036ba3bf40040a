"""Checkpoints: what is damaged is named and passed over, what is full or foreign costs nothing that was good."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax import config as configs
from armd_jax.cli import main as cli
from armd_jax.config import Config
from armd_jax.data import loader
from armd_jax.errors import UserError
from armd_jax.training import checkpoint_listing, checkpoints, sharding, state

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(smoke_run) -> Config:
    return configs.read(smoke_run)


@pytest.fixture
def run(tmp_path, smoke_run) -> pathlib.Path:
    """A copy of the smoke run, with checkpoints 30 and 40."""
    shutil.copytree(smoke_run, tmp_path / "run")
    assert _steps(tmp_path / "run") == [30, 40]
    return tmp_path / "run"


def _steps(run: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def _largest(step: pathlib.Path) -> pathlib.Path:
    return max((path for path in (step / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip(step: pathlib.Path) -> None:
    file = _largest(step)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    file.write_bytes(content)


def _truncate(step: pathlib.Path) -> None:
    _largest(step).write_bytes(_largest(step).read_bytes()[:100])


def _empty(step: pathlib.Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def _without_state(step: pathlib.Path) -> None:
    shutil.rmtree(step / "state")


def _without_manifest(step: pathlib.Path) -> None:
    for file in step.rglob("manifest.ocdbt"):
        file.unlink()


def _without_digests(step: pathlib.Path) -> None:
    shutil.rmtree(step / "meta")


def _broken_digests(step: pathlib.Path) -> None:
    for file in (step / "meta").iterdir():
        if file.is_file():
            file.write_bytes(b"{")


DAMAGES = [_flip, _truncate, _empty, _without_state, _without_manifest, _without_digests, _broken_digests]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_every_damage_is_found(run, config, capsys, damage):
    """Reading takes the checkpoint before, `armd checkpoints` names the damaged one and ends with exit code 1."""
    damage(run / "checkpoints" / "40")
    assert int(checkpoints.restore_for_inference(run, config).step) == 30
    capsys.readouterr()
    assert cli.main(["checkpoints", f"--run={run}", "--json"]) == 1
    good, bad = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (good["step"], good["whole"], bad["step"], bad["whole"]) == (30, True, 40, False)
    assert "40: " in bad["fault"] and "\n" not in bad["fault"]
    assert _steps(run) == [30, 40]  # reading moves nothing


def test_checkpoints_are_listed(run, capsys):
    """Step, size, parameters and what each holds; exit code 0 where all are whole."""
    assert cli.main(["checkpoints", f"--run={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].split()[0] == "30" and lines[2].split()[0] == "40"
    assert all("whole: parameters, optimizer, average" in line for line in lines[1:])


def test_a_checkpoint_of_another_model_is_foreign(run, config, tmp_path):
    """Arrays of other shapes are named with both shapes, and nothing is read."""
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, width=64))
    target = state.abstract(other, sharding.make_mesh(other.mesh))
    message = r"40: ValueError: .* has shape \(.*32.*\), the config asks for \(.*64"
    with (
        checkpoints.Checkpointer(run, other, read_only=True) as checkpointer,
        pytest.raises(UserError, match=message),
    ):
        checkpointer.restore(40, target)


def test_memory_that_runs_out_is_no_damage(run, config, monkeypatch):
    """A checkpoint that could not be read because memory ran out is neither called damaged nor moved aside."""
    with checkpoints.Checkpointer(run, config) as checkpointer:
        message = "RESOURCE_EXHAUSTED: Out of memory allocating 27606876160 bytes."

        def exhausted(*_, **__):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(checkpointer._manager, "restore", exhausted)
        target = state.abstract(config, sharding.make_mesh(config.mesh))
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            checkpointer.restore_newest(target, lambda *_: None)
    assert _steps(run) == [30, 40] and not (run / "damaged").exists()


def test_a_checkpoint_with_one_average_of_the_loss_is_read(run, config):
    """As runs have it that are older than the averages per kind of step: everything else is the same, bit for bit."""
    spiky = dataclasses.replace(config, training=dataclasses.replace(config.training, spike_nats=0.5))
    now, old = (checkpoints.restore_for_inference(run, one) for one in (spiky, config))
    assert old.loss_average.shape == () and now.loss_average.tolist() == [np.inf] * 7  # 3 phases, 4 numbers of streams
    same = dataclasses.replace(now, loss_average=old.loss_average)
    for one, other in zip(jax.tree.leaves(same), jax.tree.leaves(old), strict=True):
        assert np.array_equal(one, other)


def test_digest_sees_every_element():
    """One changed bit of any element changes the digest, and so does exchanging two elements."""
    array = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    digest = lambda a: int(checkpoints.digests({"a": a})["a"])  # noqa: E731
    whole = digest(array)
    for place in np.ndindex(3, 5):
        bits = np.asarray(array).view(np.uint32).copy()
        bits[place] ^= 1
        assert digest(jnp.asarray(bits.view(np.float32))) != whole, place
    assert digest(array[::-1]) != whole and digest(array[:, ::-1]) != whole
    words = np.asarray(array).view(np.uint32).ravel().astype(object)
    assert whole == sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**32
    for dtype in (jnp.int32, jnp.bfloat16):
        assert digest(jnp.ones(4, dtype)) != digest(jnp.ones(4, dtype).at[3].set(2))


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint(run, config, full_disk):
    """A save that cannot be written is told and leaves nothing; earlier ones stay, and the next one works again."""
    told, saved = [], []
    now = checkpoints.restore_for_inference(run, config)
    with checkpoints.Checkpointer(
        run, config, on_saved=saved.append, on_failed_save=lambda at, why: told.append((at, why))
    ) as checkpointer:
        with full_disk(1000):
            checkpointer.save(now, 50)
            assert not checkpointer.wait()
            deadline = time.monotonic() + 30
            while list((run / "checkpoints").glob("*tmp*")):  # a part of the save may go on for a moment
                assert time.monotonic() < deadline
                checkpointer.poll()
            assert _steps(run) == [30, 40]
        assert [at for at, _ in told] == [50] and checkpointer.steps() == [30, 40] and not saved
        assert checkpointer.save(now, 60) and checkpointer.wait()
    assert [found.step for found in checkpoint_listing.inspect(run) if not found.fault][-2:] == [40, 60]
    assert saved == [60] and len(told) == 1


def test_a_save_is_told_when_it_is_on_disk(run, config):
    """Not when it is begun; and without waiting for it, by asking now and then."""
    saved = []
    now = checkpoints.restore_for_inference(run, config)
    with checkpoints.Checkpointer(run, config, on_saved=saved.append) as checkpointer:
        checkpointer.save(now, 50)
        deadline = time.monotonic() + 30
        while not saved:
            assert time.monotonic() < deadline
            checkpointer.poll()
        assert saved == [50] and _steps(run) == [40, 50]


def test_remains_of_killed_saves_are_removed_at_the_start(run, config):
    """By whoever trains, not by whoever reads: they could keep a disk full for ever."""
    left = run / "checkpoints" / "50.orbax-checkpoint-tmp" / "state"
    left.mkdir(parents=True)
    (left / "part").write_bytes(b"part")
    with checkpoints.Checkpointer(run, config, read_only=True) as checkpointer:
        assert checkpointer.steps() == [30, 40] and left.exists()
    with checkpoints.Checkpointer(run, config) as checkpointer:
        assert checkpointer.steps() == [30, 40] and _steps(run) == [30, 40]


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_line(tmp_path, capsys, corpus, smoke_config, full_disk, monkeypatch):
    """If nothing can be saved to the very end, the run ends with `error:` and exit code 1, not with a traceback."""
    command = ["train", f"--config={smoke_config}", f"--config.data.path={corpus}", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.training.num_steps=3", "--config.order.sbp_steps=0", "--config.training.eval_every=0"]
    read, shown = loader.TrainBatches.__next__, []
    with contextlib.ExitStack() as stack, monkeypatch.context() as patched:
        patched.setattr(sys, "unraisablehook", lambda unraisable: shown.append(unraisable.exc_value))

        def filling(self):
            number, tokens_BN = read(self)
            if number == 1:  # the training step is compiled, and the compiler's cache is not filled with half a program
                stack.enter_context(full_disk(0))
            return number, tokens_BN

        patched.setattr(loader.TrainBatches, "__next__", filling)
        assert cli.main(command) == 1
    *told, last = capsys.readouterr().err.splitlines()
    assert shown == []  # TensorStore's threads fail to report to an event loop that Orbax has closed
    assert last.startswith("error: ") and last.endswith(
        "the checkpoint of step 3 could not be saved; there is no earlier one to go on from"
    )
    assert "Traceback" not in "".join(told)
    for name in ("metrics.jsonl", "events.jsonl"):
        assert sum(f"{name}: cannot be written (File too large)" in line for line in told) == 1
    assert cli.main(command) == 0 and _steps(tmp_path / "run") == [3]  # and nothing is left of what failed


def _bytes(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_only_the_parameters_that_are_used_are_restored(run, config, monkeypatch):
    """A quarter of the bytes: the average or the raw parameters, and neither the other one nor any moment."""
    whole, restored = checkpoints.restore_for_inference(run, config), []
    real = checkpoints.digests
    monkeypatch.setattr(checkpoints, "digests", lambda tree: (restored.append(_bytes(tree)), real(tree))[1])
    for ema, expected in ((True, whole.ema), (False, whole.params)):
        found = checkpoints.restore_params(run, config, ema)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, expected)))
    assert restored == [_bytes(whole.params)] * 2 and restored[0] < 0.26 * _bytes(whole)
    assert not np.array_equal(whole.ema["embedding"], whole.params["embedding"])


def test_parameters_do_not_depend_on_what_is_not_restored(run, config, capsys):
    """Moments that are damaged, or another optimizer's, do no harm; damage of the parameters is named, as ever."""
    file = next(path for path in (run / "checkpoints" / "40" / "meta").iterdir())
    meta = json.loads(file.read_text())
    newest = checkpoints.restore_params(run, config)["embedding"]

    def spoil(part: str) -> None:
        changed = {name: number ^ name.startswith(part) for name, number in meta["digests"].items()}
        assert changed != meta["digests"]
        file.write_text(json.dumps(meta | {"digests": changed}))

    spoil("opt_state.")
    assert np.array_equal(checkpoints.restore_params(run, config)["embedding"], newest)
    assert int(checkpoints.restore_for_inference(run, config).step) == 30
    spoil("ema.embedding")
    capsys.readouterr()
    assert not np.array_equal(checkpoints.restore_params(run, config)["embedding"], newest)
    assert "40: ema.embedding is not what was saved" in capsys.readouterr().err
    file.write_text(json.dumps(meta))

    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, kind="muon"))
    assert np.array_equal(checkpoints.restore_params(run, other)["embedding"], newest)
    with pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.restore_for_inference(run, other)


def test_state_restores_onto_other_devices_bit_for_bit(run, config):
    """The digests of what was saved on one device are those of what is restored, leaf by leaf."""
    now = checkpoints.restore_for_inference(run, config)
    meta = json.loads(next(path for path in (run / "checkpoints" / "40" / "meta").iterdir()).read_text())
    found = {name: int(number) for name, number in checkpoints._named(checkpoints.digests(now))}
    assert found == meta["digests"] and meta["step"] == 40
    assert len(found) == len(jax.tree.leaves(now))
