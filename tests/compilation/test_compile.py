"""Real compilations for TPU slices, by the library that a TPU machine runs."""

import contextlib
import io
import itertools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from armd_jax import config as configs
from armd_jax.cli import main as cli
from armd_jax.compilation import collectives, topology
from armd_jax.compilation import compile as compilation
from armd_jax.compilation.hlo import Program
from armd_jax.config import Config, MeshConfig
from armd_jax.core import axes, parameters
from armd_jax.errors import UserError
from armd_jax.training import sharding, state

# Sizes of activations that no weight has: 12 rows of 128 tokens, with a positional embedding of another width than 128.
BATCH, LENGTH, WIDTH, VOCAB, LAYERS = 12, 128, 256, 1280, 2
FLAGS = {
    "model.vocab_size": VOCAB,
    "model.max_length": LENGTH,
    "model.num_layers": LAYERS,
    "model.two_stream_layers": 1,
    "model.width": WIDTH,
    "model.num_heads": 4,
    "model.positional_width": 64,
    "model.remat": "dots",
    "training.batch_size": BATCH,
    "order.kind": "left_to_right",  # compiles sooner than the branches of drawn orders
    "mesh.data": 1,
    "mesh.fsdp": 4,
}
PROMISED = {
    "ar_model_flops",
    "predicted_ar_mfu",
    "bill",
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


def _armd_compile(*words: str) -> tuple[int, dict]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(["compile", "--json", *words])
    return code, json.loads(printed.getvalue())


@pytest.fixture(scope="module")
def training_step(experiment, tmp_path_factory) -> tuple[int, dict, str]:
    """The training step on four chips: exit code, result and compiled program."""
    hlo: pathlib.Path = tmp_path_factory.mktemp("program") / "step.hlo"
    words = ("--topology=v5e:2x2", f"--dump-hlo={hlo}", "--price-per-chip-hour=2")
    code, result = _armd_compile(f"--config={experiment}", *words)
    return code, result, hlo.read_text()


@pytest.mark.slow
def test_training_step_on_a_slice(training_step):
    """It fits, splash attention is in it, memory is what state and activations explain, no logits are gathered."""
    code, result, text = training_step
    assert code == 0 and result["fits"] and set(result) >= PROMISED
    assert (result["topology"], result["chips"], result["mesh"]) == ("v5e:2x2", 4, {"data": 1, "fsdp": 4, "tensor": 1})
    assert result["hbm_bytes"] == 16 * 2**30

    # The last two-stream layer and a causal one: each runs one forward kernel and two backward kernels.
    assert text.count('custom_call_target="tpu_custom_call"') == 3 * LAYERS
    for kernel in ("fwd", "dq", "dkv"):
        assert sum(n for name, n in result["attention_kernels"].items() if kernel in name) == LAYERS

    # Parameters, two moments and the average in float32 are spread over four chips, in whole tiles of 128 columns.
    params = 4 * (VOCAB * WIDTH + LAYERS * 12 * WIDTH**2)
    assert params <= result["argument_bytes"] <= 5 * params
    activation = BATCH // 4 * LENGTH * WIDTH * 2
    logits = BATCH // 4 * LENGTH * VOCAB * 4
    assert result["peak_bytes"] < result["argument_bytes"] + 2 * params + 60 * LAYERS * activation + 3 * logits

    # The rules ask for weights to be gathered: the logits or activations of all rows are larger than any of them.
    found = collectives.find(Program(text), 4)
    gathered = [c.bytes for c in found if c.kind == "all-gather"]
    assert gathered and max(gathered) <= 4 * VOCAB * WIDTH < BATCH * LENGTH * VOCAB * 4
    assert sum(c.sent_bytes for c in found) < 6 * params

    assert 0.5 * result["model_flops"] < result["executed_flops"] < 3 * result["model_flops"]
    assert 0 < result["predicted_mfu"] <= 1 and result["predicted_step_seconds"] > 0
    assert result["limiting_term"] in ("compute", "memory", "interconnect")


@pytest.mark.slow
def test_gradients_are_summed_over_devices_in_float32(training_step):
    """What a chip adds to the gradient of a matrix is not rounded to bfloat16 (`training.gradient_sums`).

    Two vectors, the start token and the one of an unseen neighbour, are summed in the dtype of the activations.
    """
    sums = [
        line for line in training_step[2].splitlines() if re.search(r" (all-reduce|reduce-scatter)(-start)?\(", line)
    ]
    assert "bf16[" in training_step[2] and any("f32[" in line for line in sums)
    types = [line.split(" all-reduce")[0].split(" reduce-scatter")[0] for line in sums]
    assert not [text for text in types if re.search(r"bf16\[\d+,", text)]


@pytest.mark.slow
def test_the_bill_of_a_training_step(training_step):
    """All loops are known, and the whole schedule is priced between the bound and a published efficiency."""
    _, result, _ = training_step
    assert result["unknown_loops"] == 0 and result["predicted_ar_mfu"] < result["predicted_mfu"]
    bill = result["bill"]
    steps = configs.TrainingConfig().num_steps
    assert (bill["steps"], bill["tokens"]) == (steps, steps * BATCH * LENGTH)
    low, high = bill["chip_hours"]
    assert low == pytest.approx(4 * steps * result["predicted_step_seconds"] / 3600)
    assert high == pytest.approx(low / bill["efficiency"]) and bill["cost"] == [2 * low, 2 * high]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 1, "fsdp": 4, "tensor": 1}, {"data": 1, "fsdp": 2, "tensor": 2}])
def test_only_weights_are_gathered(mesh, training_step):
    """No gather makes whole logits or rows of activations. It makes weights, and integers of the order.

    On a tensor axis, it also makes the aggregator's vectors, of which each device computes a part: in the forward pass,
    and for their gradients.
    """
    values = configs.default_config_dict()
    values.update_from_flattened_dict(FLAGS)
    values.mesh.update(mesh)
    config = configs.from_config_dict(values)
    text = training_step[2] if mesh == training_step[1]["mesh"] else _compiled_text(config)
    gathers = [c for c in collectives.find(Program(text), 4) if c.kind == "all-gather"]
    assert gathers
    allowed = _weights(config, mesh)
    shapes = [shape for gather in gathers for shape in gather.shapes]
    if mesh["tensor"] > 1:
        first_rows = (BATCH // mesh["fsdp"], LENGTH, WIDTH)
        assert 1 <= shapes.count(first_rows) <= 3
        shapes = [shape for shape in shapes if shape != first_rows]
    for shape in shapes:
        assert _key(shape) in allowed or math.prod(shape) <= BATCH * LENGTH, shape


def _compiled_text(config: Config) -> str:
    mesh = sharding.make_mesh(config.mesh, topology.devices(topology.parse("v5e:2x2")))
    return compilation.compile_lowered(compilation.lower_train_step(config, mesh)).as_text()


def _weights(config: Config, mesh: dict[str, int]) -> set[tuple[int, ...]]:
    """The shapes of a weight on its way from the parts on the chips to the whole: each axis in parts or whole."""
    params = jax.eval_shape(lambda key: parameters.init(key, config.model), jax.random.key(0))
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = axes.PARAMETERS.get(path[-1].key, ())
        shape = leaf.shape[leaf.ndim - len(names) :]
        parts = [mesh.get(sharding.PARAM_RULES[axis], 1) for axis in names]
        sizes = ({size, size // part} for size, part in zip(shape, parts, strict=True))
        found |= {_key(leaf.shape), *(_key(on_the_way) for on_the_way in itertools.product(*sizes))}
    return found


def _key(shape) -> tuple[int, ...]:
    """The same for all orders of a shape's axes."""
    return tuple(sorted(size for size in shape if size > 1))


@pytest.mark.slow
def test_sampler_on_a_slice(experiment):
    """The sampler compiles too: one network call per block, with rows spread over the slice."""
    code, result = _armd_compile(f"--config={experiment}", "--topology=v5e:2x2", "--what=sample", "--streams=8")
    assert code == 0 and result["fits"] and set(result) >= PROMISED
    assert (result["batch"], result["streams"]) == (4, 8)
    assert result["temp_bytes"] > 0


@pytest.mark.slow
def test_too_large_is_a_verdict(experiment):
    """A program that needs more memory than a chip has: exit code 1, fits false, and a slice that would do."""
    words = [f"--config.training.batch_size={2**20}"]
    code, result = _armd_compile(f"--config={experiment}", "--topology=v5e:2x2", *words)
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


def _replicated() -> tuple[Config, topology.Topology, jax.sharding.Mesh]:
    """A config whose state is whole on each of four chips."""
    values = configs.default_config_dict()
    values.model.update(vocab_size=50304, num_layers=24, width=2048, num_heads=16)
    values.training.batch_size = 64
    config, where = configs.from_config_dict(values), topology.parse("v5e:2x2")
    return config, where, sharding.make_mesh(config.mesh, topology.devices(where))


def test_state_is_counted_array_by_array():
    """Whatever the state holds counts, each device holds its part of it, and counters are on every device."""
    config, where, mesh = _replicated()
    shapes = state.abstract(config, mesh)
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))
    counters = sum(leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes) if not leaf.shape)
    assert counters == 5 * 4  # step, skipped, average loss, and two counters of updates in the optimizer
    # Parameters, two moments and the average, in float32.
    assert compilation.state_bytes(shapes, mesh) == 16 * params + counters
    sharded = sharding.make_mesh(MeshConfig(data=1, fsdp=4), topology.devices(where))
    part = compilation.state_bytes(state.abstract(config, sharded), sharded)
    assert part == compilation.state_bytes(shapes, sharded)  # whatever mesh the shapes were made for
    assert 4 * params <= part < 4 * params * 1.01 + counters  # a few vectors are not cut


@pytest.mark.slow
def test_suggestion_grows_with_the_need():
    """The smallest slice whose share of state and activations fits, if the batch can be divided over it."""
    config, where, mesh = _replicated()
    held = compilation.state_bytes(state.abstract(config, mesh), mesh)
    assert held > 16 * 2**30  # replicated: 16 bytes per parameter
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
    """On accelerators: bfloat16, scanned layers, and the kernel that the sizes allow. Fields that are set stay."""
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
    """No tokenizer is read: its kind says how many ids it has. The config's own number comes first."""
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
        (["--topology=v5e:2x2", "--what=serve"], "invalid choice: 'serve'"),
        (["--topology=v5e:2x2", "--slices=2"], "not divisible by the 2 slices"),
        (["--topology=v5e:4x4"], "needs 4 devices, but there are 16"),
        (["--topology=v5e:2x2", "--config.training.batch_size=6"], "training.batch_size"),
        (["--topology=v5e:2x2", "--what=sample", "--batch=3"], "--batch=3"),
        (["--topology=v5e:2x2", "--what=sample", "--price-per-chip-hour=1"], "only a training has a schedule"),
        (["--topology=v5e:2x2", "--price-per-chip-hour=-1"], "--price-per-chip-hour=-1.0: must be a number"),
    ],
)
def test_mistakes_are_one_line(experiment, words, says, capsys):
    """Exit code 2 and one line that says what is wrong."""
    flags = ["--config.mesh.fsdp=8"] if "--slices=2" in words else []
    assert cli.main(["compile", f"--config={experiment}", *words, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and len(error.splitlines()) == 1
