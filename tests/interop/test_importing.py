"""Imports of pretrained models: the same likelihoods for every M, trainable in any order, from any form of source."""

import dataclasses
import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import armd_jax as armd
from armd_jax import config as configs
from armd_jax import order
from armd_jax.cli import main as cli
from armd_jax.config import ModelConfig
from armd_jax.core import objective, parameters
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import importing, readable

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 20
TOKENS = np.random.default_rng(0).integers(0, 268, (2, LENGTH)).astype(np.int32)
GPT2, GROUPED, BIASES, QWEN3 = "gpt2", "llama with grouped queries", "llama with all biases", "qwen3"
NAMES = (
    *(GPT2, "gpt2 untied, of another MLP", GROUPED, "llama with one head of keys", "llama without groups, untied"),
    *(BIASES, "llama with wide heads", "llama with linear scaling", "llama 3", "qwen2", QWEN3, "mistral"),
)
# Layers of all three kinds, or of one or two. Two layers are enough to have them all, one value of M after another.
CASES = [(name, 1) for name in NAMES] + [(name, m) for name in (GPT2, GROUPED, BIASES) for m in (0, 2)]


def _read(folder: pathlib.Path, *args: Any) -> LanguageModel:
    return importing.open_model(importing.open_source(folder), *args)[0].load()


def _left_to_right(lm: LanguageModel, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return np.asarray(lm.log_prob(tokens, order.left_to_right(*tokens.shape)))


def _assert_same_params(one: parameters.Params, other: parameters.Params) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pretrained: types.SimpleNamespace) -> dict[str, pathlib.Path]:
    """A folder of every config; tests only read them."""
    place = tmp_path_factory.mktemp("pretrained")
    assert set(pretrained.configs) == set(NAMES)
    return {name: pretrained.write(place / name, pretrained.configs[name]) for name in NAMES}


# --- the same model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "two_stream_layers"), CASES)
def test_likelihoods_are_those_of_the_source(folders, pretrained, name, two_stream_layers):
    """Left to right, every token has the log-probability that a forward pass in float64 gives it, for every M."""
    config = pretrained.configs[name]
    expected = pretrained.log_probs(config, pretrained.weights(config), TOKENS)
    found = _left_to_right(_read(folders[name], two_stream_layers))
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_transformers_agrees(tmp_path, folders, pretrained, name):
    """The folder that `transformers` saves gives its log-probabilities and its greedy texts, for M = 0, L/2 and L."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = pretrained.configs[name]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    weights = {key: torch.from_numpy(value) for key, value in pretrained.weights(config).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.eval().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_bytes((folders[name] / "tokenizer.json").read_bytes())
    ids = torch.from_numpy(np.pad(TOKENS, ((0, 0), (1, 0)), constant_values=config["bos_token_id"]).astype(np.int64))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits.log_softmax(-1)
        texts = model.generate(ids[:1, :5], do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    expected = logits.gather(-1, ids[:, 1:, None])[..., 0].numpy()
    for two_stream_layers in (0, 1, 2) if (name, 0) in CASES else (1,):
        lm = _read(tmp_path / "saved", two_stream_layers)
        np.testing.assert_allclose(_left_to_right(lm), expected, atol=1e-4)
    made = _read(tmp_path / "saved").generate(
        prompt=TOKENS[0, :4].tolist(), max_new_tokens=8, temperature=0, stop_at_end=False
    )
    assert made.tokens_BN[0].tolist() == texts[0, 1:].tolist()


def test_a_model_that_stays_autoregressive(folders, pretrained):
    """With the aggregator `shift` there are no parts for other orders, and the likelihoods are the same."""
    config = pretrained.configs[GROUPED]
    lm = _read(folders[GROUPED], 0, None, "shift")
    assert "aggregator" not in lm.params
    np.testing.assert_allclose(
        _left_to_right(lm), pretrained.log_probs(config, pretrained.weights(config), TOKENS), atol=1e-4
    )


def test_sizes_that_are_chosen(tmp_path, folders):
    """M is half of the layers and N the source's length, unless they are given. What is written can be read."""
    lm, config = importing.open_model(importing.open_source(folders[GPT2]))
    assert (lm.config.two_stream_layers, lm.config.max_length) == (1, 40) and config.model == lm.config
    assert _read(folders[GPT2], 2, 40).config.two_stream_layers == 2
    lm, config = importing.open_model(importing.open_source(folders[GPT2]), 0, 1)
    readable.write(lm, config, tmp_path / "short")
    assert armd.load(tmp_path / "short").config.max_length == 1


def test_a_long_source_gets_rows_of_1024(tmp_path, pretrained):
    """A context of 100,000 tokens is no reason to make rows of as many."""
    config = pretrained.configs[GROUPED] | {"max_position_embeddings": 100_000}
    folder = pretrained.write(tmp_path / "long", config)
    assert _read(folder).config.max_length == 1024 and _read(folder, 1, 5000).config.max_length == 5000


# --- forms of a source ------------------------------------------------------------------------------------------------


def _sharded(folder: pathlib.Path, weights: dict[str, np.ndarray]) -> None:
    """Three files with every third weight each, and their index."""
    file_of = {name: f"model-{n % 3 + 1:05}-of-00003.safetensors" for n, name in enumerate(sorted(weights))}
    for file in set(file_of.values()):
        part = {name: value for name, value in weights.items() if file_of[name] == file}
        safetensors.numpy.save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("name", [GPT2, BIASES])
@pytest.mark.parametrize("form", ["sharded", "without a head", "with copies"])
def test_forms_of_a_source(tmp_path, pretrained, folders, name, form):
    """Files with an index, the names of a model that was saved without its head, and copies: the same parameters."""
    config = pretrained.configs[name]
    weights = pretrained.weights(config)
    folder = pretrained.write(tmp_path / "source", config, weights)
    match form:
        case "sharded":
            _sharded(folder, weights)
        case "without a head":
            bare = {key.partition(".")[2]: value for key, value in weights.items()}
            safetensors.numpy.save_file(bare, folder / "model.safetensors")
        case "with copies":
            embedding = next(value for key, value in weights.items() if key.endswith(("wte.weight", "tokens.weight")))
            more = {"lm_head.weight": embedding.copy()}
            if name == GPT2:
                more |= {f"transformer.h.{i}.attn.bias": np.tri(40, dtype=bool)[None, None] for i in range(2)}
                more |= {f"transformer.h.{i}.attn.masked_bias": np.full((), -1e4, np.float32) for i in range(2)}
            else:
                more["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
            safetensors.numpy.save_file(weights | more, folder / "model.safetensors")
    _assert_same_params(_read(folder).params, _read(folders[name]).params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_read_as_it_is(tmp_path, pretrained, dtype):
    """The parameters are the rounded numbers, in float32."""
    config = pretrained.configs["qwen2"]
    half = {name: value.astype(dtype) for name, value in pretrained.weights(config).items()}
    rounded = {name: value.astype(np.float32) for name, value in half.items()}
    one, other = (_read(pretrained.write(tmp_path / str(i), config, w)) for i, w in enumerate((half, rounded)))
    _assert_same_params(one.params, other.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(one.params)} == {jnp.dtype("float32")}


def test_newer_and_older_spellings_of_rope(tmp_path, pretrained):
    """The section of transformers 5 and the fields before it are one model; two that differ are refused."""
    older = pretrained.configs["llama 3"]
    scaling = older["rope_scaling"]
    newer = {name: value for name, value in older.items() if name not in ("rope_scaling", "rope_theta")}
    newer["rope_parameters"] = scaling | {"rope_theta": older["rope_theta"]}
    one, other = (_read(pretrained.write(tmp_path / str(i), each)) for i, each in enumerate((older, newer)))
    assert one.config == other.config and one.config.rope_scaling == "llama3"
    both = older | {"rope_parameters": {"rope_type": "default"}}
    with pytest.raises(UserError, match=r"rope_scaling=.* cannot be imported: rope_parameters says something else"):
        _read(pretrained.write(tmp_path / "both", both))


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_fields_that_a_type_does_not_have_mean_nothing(tmp_path, pretrained, folders, kind):
    """Transformers gives the biases of queries, keys and values to every Qwen2 and to no Mistral, whatever it says."""
    config = pretrained.configs[kind]
    claims = config | {"attention_bias": True, "mlp_bias": True}
    folder = pretrained.write(tmp_path / "source", claims, pretrained.weights(config))
    assert _read(folder).config == _read(folders[kind]).config


# --- any order --------------------------------------------------------------------------------------------------------

GATES = (("left",), ("unseen_left",), ("sum", "norm", "scale"), ("sum", "position", "kernel"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [GPT2, GROUPED])
def test_parts_for_other_orders_are_closed_and_can_be_trained(folders, name):
    """What is not autoregressive adds nothing at first, and each part of it has a gradient under a strided order."""
    lm = _read(folders[name])
    aggregator = lm.params["aggregator"]
    np.testing.assert_array_equal(aggregator["left"], np.eye(24))
    for leaf in jax.tree.leaves({key: value for key, value in aggregator.items() if "left" not in key}):
        assert not np.asarray(leaf).any()
    drawn, tokens = order.strided(2, LENGTH, 4), jnp.asarray(TOKENS)

    @jax.jit
    def gradient(params: parameters.Params) -> parameters.Params:
        return jax.grad(lambda p: objective.loss_sums(p, lm.config, tokens, drawn).weighted_nll)(params)

    found = gradient(lm.params)
    for path in GATES:
        part = found["aggregator"]
        for key in path:
            part = part[key]
        assert np.abs(part).max() > 1e-3, path
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.isfinite(leaf).all() and np.any(np.asarray(leaf) != 0), jax.tree_util.keystr(path)


def _grouped_with_learned_positions() -> LanguageModel:
    """No source has both. Its parameters are random, those of the aggregator too."""
    model = ModelConfig(
        **dict(vocab_size=270, max_length=40, num_layers=2, two_stream_layers=1, width=24, num_heads=4, num_kv_heads=2),
        **dict(positional_width=8, embedding_scale="one", learned_positions=40, prediction_position="previous"),
        **dict(qkv_bias=True, attention_out_bias=True, mlp_bias=True, mlp="swiglu"),
    )
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), model))
    rng = np.random.default_rng(0)
    return LanguageModel(model, jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), shapes))


@pytest.mark.slow
@pytest.mark.parametrize("name", [GROUPED, "grouped, with learned positions"])
def test_decoding_reports_the_likelihoods_of_the_parallel_pass(folders, name):
    """Strided, lossless and confident: what a cache gives is what a forward pass under that order gives."""
    lm = _read(folders[name]) if name in folders else _grouped_with_learned_positions()
    asked: dict[str, Any] = dict(length=12, prompt=[[1, 2, 3], [4, 5, 6]], stop_at_end=False, seed=1)
    for how in ({"streams": 3}, {"mode": "lossless", "streams": 3}, {"mode": "confident", "streams": 3}):
        made = lm.generate(**asked, **how, temperature=0.7)
        np.testing.assert_allclose(
            made.log_prob_BN, lm.log_prob(made.tokens_BN, made.order), atol=1e-5, err_msg=str(how)
        )


# --- more ids than tokens ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory, pretrained: types.SimpleNamespace) -> pathlib.Path:
    """The import of a model with 300 rows of its embedding for a tokenizer of 270 tokens; the rest are likely."""
    place = tmp_path_factory.mktemp("padded")
    config = pretrained.configs["qwen2"] | {"vocab_size": 300}
    weights = pretrained.weights(config)
    weights["model.embed_tokens.weight"][270:] *= 3
    folder = pretrained.write(place / "source", config, weights)
    assert cli.main(["import", f"--from={folder}", f"--out={place / 'out'}", "--two-stream=1"]) == 0
    return place / "out"


@pytest.mark.slow
def test_a_padded_vocabulary_is_kept(padded, pretrained):
    """Ids without tokens have their share of the probability, may be drawn, and are no text."""
    lm = armd.load(padded)
    assert (lm.config.vocab_size, lm.tokenizer.vocab_size) == (300, 270)
    config = pretrained.configs["qwen2"] | {"vocab_size": 300}
    weights = pretrained.weights(config)
    weights["model.embed_tokens.weight"][270:] *= 3
    tokens = np.where(np.arange(LENGTH) % 5 == 3, 299, TOKENS)
    np.testing.assert_allclose(_left_to_right(lm, tokens), pretrained.log_probs(config, weights, tokens), atol=1e-4)
    made = lm.generate(batch=8, length=LENGTH, seed=0, stop_at_end=False)
    without_text = made.tokens_BN >= 270
    assert without_text.any()
    texts = lm.texts(made)
    for row in range(8):
        assert texts[row] == lm.tokenizer.decode(made.tokens_BN[row][~without_text[row]])


_EXPERIMENT = """
import dataclasses, pathlib
from armd_jax import config as configs
from armd_jax.config import default_config_dict

def get_config(arg=""):
    config = default_config_dict()
    config.model.update(dataclasses.asdict(configs.read(pathlib.Path(arg)).model))
    config.data.tokenizer = config.training.init_from = arg
    config.order.update(kind="strided", streams=(1, 2), sbp_steps=0)
    config.training.update(num_steps=2, batch_size=2, eval_every=0, checkpoint_every=2)
    return config
"""


@pytest.mark.slow
def test_training_goes_on_from_an_import(tmp_path, corpus, padded, capsys):
    """A run takes all rows of the source, also if the config leaves the size to the data, and goes on as it began."""
    (tmp_path / "tune.py").write_text(_EXPERIMENT)
    command = ["train", f"--config={tmp_path / 'tune.py'}:{padded}", f"--config.data.path={corpus}"]
    command += [f"--workdir={tmp_path / 'run'}", "--config.model.vocab_size=0"]
    assert cli.main(command) == 0
    lm = armd.load(tmp_path / "run", ema=False)
    assert (lm.config.vocab_size, lm.tokenizer.vocab_size) == (300, 270)
    before, after = armd.load(padded).params["embedding"], lm.params["embedding"]
    assert np.abs(after - before)[:300].max() < 0.05 and not np.array_equal(after, before)
    capsys.readouterr()
    assert cli.main([*command, "--config.model.vocab_size=270", f"--workdir={tmp_path / 'other'}"]) == 2
    assert "model.vocab_size=270" in capsys.readouterr().err


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_makes_what_the_others_take(tmp_path, capsys, corpus, folders):
    """`armd import`, then `armd sample` and `armd eval` on the result; the export is that of the model."""
    out = tmp_path / "out"
    assert cli.main(["import", f"--from={folders[GROUPED]}", f"--out={out}", "--max-length=32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out)}
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer"]
    lm = armd.load(out)
    assert lm.config == configs.read(out).model and lm.config.max_length == 32
    _assert_same_params(lm.params, _read(folders[GROUPED], 1, 32).params)
    assert cli.main(["sample", f"--run={out}", "--streams=2", "--prompt=The", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    evaluation = [
        "eval",
        f"--run={out}",
        f"--data={corpus}",
        "--no-baselines",
        "--draws=0",
        "--streams=2",
        "--json",
        f"--out={tmp_path / 'figures'}",
    ]
    assert cli.main(evaluation) == 0
    assert json.loads(capsys.readouterr().out)["left_to_right"]["perplexity_per_token"] > 1


def test_an_import_survives_being_written(tmp_path, folders):
    """Every parameter of every kind of source comes back from its export, to the last bit."""
    for name in (GPT2, BIASES, QWEN3):
        source, config = importing.open_model(importing.open_source(folders[name]), 2)
        lm = source.load()
        readable.write(source, config, tmp_path / name)
        again = armd.load(tmp_path / name)
        assert dataclasses.replace(again.config) == lm.config and again.tokenizer.hash == lm.tokenizer.hash
        _assert_same_params(again.params, lm.params)
