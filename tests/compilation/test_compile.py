"""Real compilations for TPU slices, by the library that a TPU machine runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from armd_jax import config as configs
from armd_jax.cli import main as cli
from armd_jax.compilation import compile as compilation
from armd_jax.compilation import topology
from armd_jax.compilation.hlo import Program
from armd_jax.config import MeshConfig
from armd_jax.errors import UserError
from armd_jax.training import sharding

LENGTH, BATCH, VOCAB, WIDTH, LAYERS = 128, 16, 2048, 128, 2
FLAGS = {
    "model.vocab_size": VOCAB,
    "model.max_length": LENGTH,
    "model.num_layers": LAYERS,
    "model.two_stream_layers": 1,
    "model.width": WIDTH,
    "model.num_heads": 2,
    "training.batch_size": BATCH,
    "order.kind": "left_to_right",
    "mesh.data": 1,
    "mesh.fsdp": 4,
}
PROMISED = {
    "config",
    "topology",
    "chips",
    "mesh",
    "fits",
    "hbm_bytes",
    "argument_bytes",
    "output_bytes",
    "temp_bytes",
    "collectives",
    "attention_kernels",
    "model_flops",
    "predicted_step_seconds",
    "predicted_mfu",
    "limiting_term",
    "compile_seconds",
}


@pytest.fixture(scope="module", autouse=True)
def environment():
    """libtpu looks for no TPU."""
    topology.prepare_environment()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> str:
    """An experiment file of the sizes above."""
    file = tmp_path_factory.mktemp("experiment") / "small.py"
    lines = [f"    config.{name} = {value!r}" for name, value in FLAGS.items()]
    file.write_text(
        "from armd_jax import config as configs\n\n\ndef get_config(arg=''):\n"
        "    config = configs.default_config_dict()\n" + "\n".join(lines) + "\n    return config\n"
    )
    return str(file)


def _armd_compile(capsys, *words: str) -> tuple[int, dict]:
    code = cli.main(["compile", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_training_step_on_a_slice(experiment, tmp_path, capsys):
    """It fits, splash attention is in it, memory is what state and activations explain, no logits are gathered."""
    hlo = tmp_path / "step.hlo"
    code, result = _armd_compile(capsys, f"--config={experiment}", "--topology=v5e:2x2", f"--dump-hlo={hlo}")
    assert code == 0 and result["fits"] and set(result) >= PROMISED
    assert (result["topology"], result["chips"], result["mesh"]) == ("v5e:2x2", 4, {"data": 1, "fsdp": 4, "tensor": 1})
    assert result["hbm_bytes"] == 16 * 2**30

    # The last two-stream layer and a causal one: each forward once, and backward in two kernels.
    text = hlo.read_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3 * LAYERS
    for kernel in ("fwd", "dq", "dkv"):
        assert sum(n for name, n in result["attention_kernels"].items() if kernel in name) == LAYERS

    # Parameters, two moments and the average in float32 lie on four chips, in whole tiles of 128 columns.
    parameters = 4 * (VOCAB * WIDTH + LAYERS * 12 * WIDTH**2)
    assert parameters <= result["argument_bytes"] <= 5 * parameters
    activation = BATCH // 4 * LENGTH * WIDTH * 2
    logits = BATCH // 4 * LENGTH * VOCAB * 4
    assert result["peak_bytes"] < result["argument_bytes"] + 2 * parameters + 60 * LAYERS * activation + 3 * logits

    # What the rules ask to be gathered is weights: all rows' logits or activations are larger than any of them.
    collectives = Program(text).collectives(4)
    gathered = [c.bytes for c in collectives if c.kind == "all-gather"]
    assert gathered and max(gathered) <= 4 * VOCAB * WIDTH < BATCH * LENGTH * VOCAB * 4
    assert sum(c.sent_bytes for c in collectives) < 6 * parameters

    assert 0.5 * result["model_flops"] < result["executed_flops"] < 3 * result["model_flops"]
    assert 0 < result["predicted_mfu"] <= 1 and result["predicted_step_seconds"] > 0
    assert result["limiting_term"] in ("compute", "memory", "interconnect")


def test_sampler_on_a_slice(experiment, capsys):
    """The sampler compiles too: a network call a block, with rows spread over the slice."""
    code, result = _armd_compile(capsys, f"--config={experiment}", "--topology=v5e:2x2", "--what=sample", "--streams=8")
    assert code == 0 and result["fits"] and set(result) >= PROMISED
    assert (result["batch"], result["streams"]) == (4, 8)
    assert result["temp_bytes"] > 0


def test_too_large_is_a_verdict(experiment, capsys):
    """A program that needs more memory than a chip has: exit code 1, fits false, and a slice that would do."""
    words = [f"--config.training.batch_size={2**20}"]
    code, result = _armd_compile(capsys, f"--config={experiment}", "--topology=v5e:2x2", *words)
    assert code == 1 and result["fits"] is False and set(result) >= PROMISED
    assert result["argument_bytes"] + result["temp_bytes"] > result["hbm_bytes"]
    assert result["suggestion"].startswith("--topology=v5e:")


def test_not_fitting_is_told_from_failing():
    """The compiler's own figures, in bytes."""
    mesh = sharding.make_mesh(MeshConfig(), topology.devices(topology.parse("v5e:2x2")))
    large = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(compilation.DoesNotFit) as error:
        compilation.compile_lowered(jax.jit(lambda a: a + 1).lower(large))
    assert error.value.needed >= 2 * 2**34 > error.value.available > 14 * 2**30
    small = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    unknown = jax.ffi.ffi_call("no_such_kernel", jax.ShapeDtypeStruct((8, 128), jnp.float32))
    with pytest.raises(compilation.CompilerFailed, match="no_such_kernel"):
        compilation.compile_lowered(jax.jit(unknown).trace(small).lower(lowering_platforms=("tpu",)))


def test_suggestion_grows_with_the_need():
    """The smallest slice whose share of state and activations fits, where the batch can be divided over it."""
    values = configs.default_config_dict()
    values.model.update(vocab_size=50304, num_layers=24, width=2048, num_heads=16)
    values.training.batch_size = 64
    config = configs.from_config_dict(values)
    where = topology.parse("v5e:2x2")
    mesh = sharding.make_mesh(config.mesh, topology.devices(where))
    held = compilation.state_bytes(config, mesh)
    assert held > 16 * 2**30  # replicated: 16 bytes a parameter
    error = lambda rest: compilation.DoesNotFit(held + rest * 2**30, int(15.75 * 2**30))  # noqa: E731
    assert compilation.suggest(config, where, mesh, error(1)).startswith("--topology=v5e:2x2 --config.mesh.data=1")
    assert compilation.suggest(config, where, mesh, error(20)).startswith("--topology=v5e:2x4")
    assert compilation.suggest(config, where, mesh, error(10_000)) is None


def test_slices_are_the_outer_part_of_the_data_axis():
    """Each slice holds whole fsdp and tensor groups; a data axis that cannot be cut into the slices is refused."""
    devices = topology.devices(topology.parse("v5e:2x2", slices=2))
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert slices.shape == (4, 2, 1)
    assert (slices == np.array([0, 0, 1, 1])[:, None, None]).all()
    with pytest.raises(UserError, match="mesh.data=1 is not divisible by the 2 slices"):
        sharding.make_mesh(MeshConfig(data=1, fsdp=8), devices)
    with pytest.raises(UserError, match="needs 6 devices, but there are 8"):
        sharding.make_mesh(MeshConfig(data=3, fsdp=2), devices)


def test_platform_decides_what_is_auto():
    """On accelerators: bfloat16, scanned layers, and the kernel that the sizes allow; what is set stays."""
    model = configs.ModelConfig(max_length=256)
    tpu, cpu = model.for_platform("tpu"), model.for_platform("cpu")
    assert (tpu.dtype, tpu.scan_layers, tpu.attention) == ("bfloat16", "on", "splash")
    assert (cpu.dtype, cpu.scan_layers, cpu.attention) == ("float32", "off", "auto")
    assert (tpu.attention_chunk, cpu.attention_chunk) == (512, 128)
    assert configs.ModelConfig(attention_chunk=64).for_platform("tpu").attention_chunk == 64
    assert configs.ModelConfig(max_length=100).for_platform("tpu").attention == "auto"
    assert configs.ModelConfig(dtype="float32", attention="chunked").for_platform("tpu").attention == "chunked"
    gpu = configs.ModelConfig(max_length=100).for_platform("gpu")
    assert (gpu.dtype, gpu.scan_layers, gpu.attention) == ("bfloat16", "on", "flash")
    assert configs.ModelConfig(num_heads=2).for_platform("gpu").attention == "auto"  # heads of 384


@pytest.mark.parametrize(
    ("tokenizer", "size"),
    [("sentencepiece", 2048), ("bytes", 257), ("gpt2", 50257), ("vocabularies/bert-base-uncased", 30522)],
)
def test_vocabulary_by_tokenizer(tokenizer, size):
    """No tokenizer is read: its kind says how many ids it has. The config's own number goes first."""
    values = configs.default_config_dict()
    values.data.tokenizer = tokenizer
    assert compilation.assumed_vocabulary(configs.from_config_dict(values)).model.vocab_size == size
    values.model.vocab_size = 77
    assert compilation.assumed_vocabulary(configs.from_config_dict(values)).model.vocab_size == 77


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topology=v5e:3x3"], "v5e:3x3"),
        (["--topology=v5x:4x4"], "v5x"),
        (["--topology=v5e:2x2", "--slices=2"], "not divisible by the 2 slices"),
        (["--topology=v5e:4x4"], "needs 4 devices, but there are 16"),
        (["--topology=v5e:2x2", "--config.training.batch_size=6"], "training.batch_size"),
        (["--topology=v5e:2x2", "--what=sample", "--batch=3"], "--batch=3"),
    ],
)
def test_mistakes_are_one_line(experiment, words, says, capsys):
    """Exit code 2 and a line that says what is wrong."""
    flags = ["--config.mesh.fsdp=8"] if "--slices=2" in words else []
    assert cli.main(["compile", f"--config={experiment}", *words, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and len(error.splitlines()) == 1
