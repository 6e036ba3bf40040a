"""`armd export --format=stablehlo`: scoring and sampling as programs that run where JAX alone is installed.

The folder holds three programs of `jax.export`, each for CPU, CUDA and TPU: `score` and `score_in_order`, which are
`inference.likelihood`, and `sample`, which is `inference.sampler` for a fixed number of streams and of new tokens.
Numbers of texts and lengths of prompts are left open. Weights are no part of the programs: `weights.npz` has them under
the names of `interop.safetensors_format`, and every program takes them as its first argument. `run.py` is what a user
starts.
"""

import dataclasses
import functools
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from armd_jax import files, typed
from armd_jax.config import ModelConfig
from armd_jax.core import order as orders
from armd_jax.core.order import Order
from armd_jax.errors import UserError
from armd_jax.inference import likelihood, sampler, schedule
from armd_jax.inference.draw import GREEDY, Draw
from armd_jax.inference.sampler import Ending
from armd_jax.interop import safetensors_format
from armd_jax.interop.readable import Readable, reading_place

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = "weights.npz"
# As many prompt tokens per call of the sampler, and positions whose logits exist at a time: a fixed program cannot
# choose them by the device that it will run on, or by the number of texts.
_CHUNK = 32
_LOSS_CHUNK = 128

Weights = dict[str, jax.Array]

_RUNNER = '''"""python run.py score ID …, or python run.py sample SEED TEMPERATURE [ID …]; see README.md."""
import pathlib, sys
import jax.export, jax.numpy as jnp

here = pathlib.Path(__file__).resolve().parent
weights = jax.device_put(dict(jnp.load(here / "weights.npz")))
def program(name):
    call = jax.jit(jax.export.deserialize(bytearray((here / f"{name}.jax_export").read_bytes())).call)
    return lambda *inputs: call(weights, *inputs)
score, score_in_order, sample = map(program, ("score", "score_in_order", "sample"))

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["score", *ids]:
            print(score(jnp.array([[int(word) for word in ids]]))[0].tolist())
        case ["sample", seed, temperature, *ids]:
            prompt = jnp.array([[int(word) for word in ids] or [0]])
            for out in sample(int(seed), prompt, jnp.array([len(ids)]), float(temperature)):
                print(out[0].tolist())
        case _:
            sys.exit(__doc__)
'''

_README = """# An ARMD as programs of jax.export

`export.json` has the numbers of this model and of its sampler. Nothing here needs the package that trained the model:

```bash
pip install jax flatbuffers
python run.py score 5 6 7            # the log-probability of each token, left to right
python run.py sample 0 1.0 5 6 7     # seed, temperature, prompt: tokens, and their log-probabilities
```

From Python, for batches (`import run`; arrays are int32, log-probabilities float32 in nats):

- `run.score(tokens)`: tokens [B, N] -> [B, N], left to right. N is at most {max_length}, and any N costs as much.
- `run.score_in_order(tokens, positions, blocks)`: likewise under an order. Arrays [B, N]: the positions in the order in
  which they are predicted, and the number of the block of each, which starts at 1 and grows in steps of 0 or 1.
- `run.sample(seed, prompts, lengths, temperature)`: prompts [B, P], of which the first lengths [B] tokens count (0: no
  prompt); P is at most {prompt}. It returns the {length} tokens behind each prompt, drawn in {streams} stream(s), and
  their log-probabilities, which are the model's own, before temperature: both [B, {length}]. Temperature is a float;
  0.0 takes the likeliest tokens. Token {end_of_text} ends a text; what is behind it is no part of the text.

Ids are not checked. `tokenizer/` has the files of the tokenizer. Arrays may have any size, but each new one is
compiled. Activations are {dtype} on every device.

**How long it can be read.** The programs are portable StableHLO, written by jax {jax} with calling convention
{calling_convention_version} for {platforms}, and have no custom calls beyond those that jax.export vouches for. It
promises that a jax and jaxlib up to 6 months newer or 3 weeks older than those compile and run them. For an archive,
keep the run or its safetensors.

`sha256sum -c SHA256SUMS` checks all files.
"""


def check(config: ModelConfig, streams: int, length: int | None) -> int:
    """How many tokens the sampler draws: `length`, by default half of the model's max_length.

    Raises UserError if there is no sampler of such numbers, or no package to write programs with.
    """
    if not config.has_orders:
        raise UserError("--format=stablehlo: a denoiser (model.kind) has no order to score and no streams")
    length = max(config.max_length // 2, 1) if length is None else length
    if not 1 <= length <= config.max_length:
        raise UserError(f"--length={length}: must be in 1 .. {config.max_length}, the model's max_length")
    if streams < 1:
        raise UserError(f"--streams={streams}: must be at least 1")
    if length % streams:
        raise UserError(f"--length={length} is not divisible by --streams={streams}: choose another of the two")
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        extra = "pip install -e '.[stablehlo]'"
        raise UserError(f"--format=stablehlo needs flatbuffers, which is in an extra: {extra}") from error
    return length


def write(model: Readable, streams: int, length: int, out: pathlib.Path) -> None:
    """Writes the folder, whole or not at all. The same model gives the same bytes.

    streams: S of the sampler. length: how many tokens it draws, as `check` gives it.
    Raises UserError if `out` exists or cannot be written, and OSError if the export does not fit on the disk.
    """
    safetensors_format.check_new(out)
    config, tokenizer = _fixed(model.config), model.tokenizer
    shapes = safetensors_format.shapes(model.config)
    exported = _programs(config, shapes, streams, length, tokenizer.end_of_text)
    facts = {
        "jax": jax.__version__,
        "calling_convention_version": max(each.calling_convention_version for each in exported.values()),
        "platforms": list(PLATFORMS),
        "dtype": config.dtype,
        "vocab_size": config.vocab_size,
        "max_length": config.max_length,
        "streams": streams,
        "length": length,
        "end_of_text": tokenizer.end_of_text,
    }
    page = _README.format(**facts | {"platforms": ", ".join(PLATFORMS)}, prompt=_longest_prompt(config, length))
    with files.new_folder(out) as folder:
        try:
            _save_npz(folder / WEIGHTS, model.read, sorted(shapes, key=reading_place))
        except OSError as error:
            raise files.os_error(error, out / WEIGHTS) from error
        for name, each in exported.items():
            files.write(folder / f"{name}.jax_export", bytes(each.serialize()))
        tokenizer.save(folder / "tokenizer")
        files.write(folder / "export.json", typed.to_json(facts, indent=2) + "\n")
        files.write(folder / "run.py", _RUNNER)
        files.write(folder / "README.md", page)
        files.write_checksums(folder)


def _save_npz(file: pathlib.Path, read: Callable[[str], np.ndarray], names: Sequence[str]) -> None:
    """The file of `np.savez`, which has to have all arrays in memory at once."""
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name in names:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(read(name)))


def _longest_prompt(config: ModelConfig, length: int) -> int:
    """Width of the widest array of prompts; 1 if there is room for none, because arrays of width 0 are not exported."""
    return max(config.max_length - length, 1)


def _fixed(config: ModelConfig) -> ModelConfig:
    """The config with everything decided that is otherwise chosen by the device, or by the number of texts."""
    decided = config.for_platform("cpu")
    return dataclasses.replace(decided, loss_chunk=config.loss_chunk or _LOSS_CHUNK, remat="none")


def _programs(
    config: ModelConfig, shapes: dict[str, jax.ShapeDtypeStruct], streams: int, new: int, end: int
) -> dict[str, jax.export.Exported]:
    """The programs by name."""
    (batch, tokens), (texts, prompt) = (
        jax.export.symbolic_shape(f"b, {name}", constraints=[f"{name} <= {most}"])
        for name, most in (("n", config.max_length), ("p", _longest_prompt(config, new)))
    )
    ints_BN = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    ints_BP = jax.ShapeDtypeStruct((texts, prompt), jnp.int32)
    ints_B = jax.ShapeDtypeStruct((texts,), jnp.int32)
    seed, temperature = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    draws = functools.partial(_sample, config, streams, new, end)
    return {
        "score": _export(functools.partial(_score, config), shapes, ints_BN),
        "score_in_order": _export(functools.partial(_score_in_order, config), shapes, ints_BN, ints_BN, ints_BN),
        "sample": _export(draws, shapes, seed, ints_BP, ints_B, temperature),
    }


def _export(function: Callable[..., Any], *shapes: Any) -> jax.export.Exported:
    """A function as a program for all platforms, without the places in source files that its operations come from.

    These would name folders of this machine, and make programs differ that compute the same.
    """
    frames = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", frames)


def _score(config: ModelConfig, weights: Weights, tokens_BN: jax.Array) -> jax.Array:
    """log p of every token [B, N], left to right."""
    order = orders.left_to_right(tokens_BN.shape[0], tokens_BN.shape[1])
    return _score_in_order(config, weights, tokens_BN, order.positions_BN, order.block_BN)


def _score_in_order(
    config: ModelConfig, weights: Weights, tokens_BN: jax.Array, positions_BN: jax.Array, block_BN: jax.Array
) -> jax.Array:
    """`likelihood.log_prob` under an order, for any length.

    What is computed always has max_length positions, because the network's own loops need a number. Those that are
    added come last and one by one, so that they change no probability of the others.
    """
    length, width = tokens_BN.shape[1], config.max_length
    index_W = jnp.arange(width, dtype=jnp.int32)

    def padded(a_BN: jax.Array, added: jax.Array | int) -> jax.Array:
        return jnp.where(index_W < length, a_BN[:, jnp.minimum(index_W, length - 1)], added)

    positions_BW = padded(positions_BN, index_W)
    block_BW = padded(block_BN, block_BN[:, -1:] + 1 + index_W - length)
    order = Order(positions_BW, block_BW, jnp.ones(block_BW.shape, jnp.float32))
    params = safetensors_format.per_layer(weights, config)
    # Gathers fit any length, so that JAX can say which one is too long. With a slice it would find a fault in its size.
    return likelihood.log_prob(params, config, padded(tokens_BN, 0), order)[:, jnp.arange(length)]


def _sample(
    config: ModelConfig,
    streams: int,
    new: int,
    end: int,
    weights: Weights,
    seed: jax.Array,
    prompt_BP: jax.Array,
    length_B: jax.Array,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What `LanguageModel.generate` draws behind prompts with one seed: tokens and log-probabilities [B, new]."""
    params = safetensors_format.per_layer(weights, config)
    most = jnp.minimum(prompt_BP.shape[1], config.max_length - new)
    plan = schedule.after_prompts(prompt_BP, jnp.clip(length_B, 0, most), new, streams)
    seed_B, text_B = jnp.broadcast_to(seed, length_B.shape), jnp.arange(length_B.shape[0], dtype=jnp.int32)
    state = sampler.begin(params, config, plan, seed_B, text_B, min(_CHUNK, new + streams))
    # The least temperature takes the likeliest token, as temperature 0 does in `Draw.make`.
    draw = Draw(jnp.maximum(temperature, GREEDY), top_p=None, greedy=False, top_k=None)
    ending = Ending(jnp.int32(end), jnp.float32(0))
    state = sampler.advance(params, config, plan, state, draw, ending, plan.num_calls)
    place_BR = plan.num_evidence - plan.first_B[:, None] + jnp.arange(new)
    index_BR = jnp.take_along_axis(plan.index_BW, place_BR, axis=1)
    tokens_BR = sampler.values_at(state.context_BT, index_BR)
    log_prob_BR = sampler.values_at(state.log_prob_BT, index_BR)
    if streams > 1:
        return tokens_BR, log_prob_BR
    # In one stream, nothing is drawn behind an end.
    is_end_BR = (tokens_BR == end).astype(jnp.int32)
    behind_BR = jnp.cumsum(is_end_BR, axis=1) > is_end_BR
    return jnp.where(behind_BR, end, tokens_BR), jnp.where(behind_BR, 0.0, log_prob_BR)
