"""`armd export --format=huggingface`, as far as it can be tested without PyTorch: files, names, and the way back.

What transformers make of these folders is in `test_transformers.py`.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import shutil
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tokenizers as library
import yaml

import armd_jax as armd
from armd_jax import config as configs
from armd_jax import order
from armd_jax.cli import main as cli
from armd_jax.config import ModelConfig
from armd_jax.core import parameters
from armd_jax.data import tokenizer_export, tokenizers
from armd_jax.data.sentencepiece_training import train_model
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import importing, readable, safetensors_format
from armd_jax.interop.huggingface import card, exporting, names, native
from armd_jax.interop.huggingface.card import Facts
from armd_jax.interop.huggingface.configs import ARMD_FIELDS
from armd_jax.interop.huggingface.source import Folder
from armd_jax.training import sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def _json(file: pathlib.Path) -> Any:
    return json.loads(file.read_text())


def _same_params(one: parameters.Params, other: parameters.Params) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(a, b), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_armd) -> pathlib.Path:
    """The export of the default model; tests only read it."""
    out = tmp_path_factory.mktemp("export") / "model"
    exporting.write(readable.of(small_armd.model("default")), out, Facts())
    return out


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_model_comes_back_to_the_last_bit(tmp_path, small_armd):
    """Parameters, config and tokenizer of a folder with its own code, by `armd.load`, for every kind of network."""
    for number, name in enumerate(small_armd.configs):
        lm, out = small_armd.model(name), tmp_path / str(number)
        written = exporting.write(readable.of(lm), out, Facts(), code="remote", shard_gb=1e-5 if number % 2 else 5)
        assert not written.native and len(list(out.glob("*.safetensors"))) > 1 or not number % 2
        back = armd.load(out)
        _same_params(lm.params, back.params)
        assert back.config == lm.config and back.tokenizer.hash == lm.tokenizer.hash


def test_a_folder_is_spread_over_a_mesh(folder, small_armd):
    """As runs and exports are, with the same bits."""
    lm = armd.load(folder, mesh=sharding.make_mesh(configs.MeshConfig()))
    assert lm.params["embedding"].sharding.mesh.axis_names == sharding.AXES
    _same_params(lm.params, small_armd.model("default").params)


def test_every_field_that_decides_weights_is_written():
    """A field of `ModelConfig` that a folder did not say would come back as its default, without a word."""
    rope = {"rope_base", "rope_scaling", "rope_factor", "rope_low", "rope_high", "rope_original_length"}
    assert set(configs.weight_fields()) <= ARMD_FIELDS.keys() | rope | {"kind"}
    told = native.rope_parameters(ModelConfig(rope_scaling="llama3", rope_base=3.0, rope_factor=5.0))
    assert (told["rope_theta"], told["factor"], len(told)) == (3.0, 5.0, 6)


def test_the_table_names_every_weight(small_armd):
    """Each weight of ours is in exactly one entry, and each entry leads there and back to the same bits."""
    for name in small_armd.configs:
        lm = small_armd.model(name)
        flat = {key: np.asarray(value) for key, value in safetensors_format.flatten(lm.params, lm.config).items()}
        entries = list(names.table("armd", lm.config))
        assert sorted(each for entry in entries for each in entry.ours) == sorted(flat)
        theirs = [each for entry in entries for each in entry.theirs]
        assert len(set(theirs)) == len(theirs)
        for entry in entries:
            ours = tuple(flat[each] for each in entry.ours)
            for a, b in zip(ours, entry.to_ours(entry.to_theirs(ours)), strict=True):
                np.testing.assert_array_equal(a, b)
        for key, value in flat.items():
            np.testing.assert_array_equal(safetensors_format.weight(lm.params, lm.config, key), value)


def test_the_command_line_goes_there_and_back(tmp_path, small_armd, capsys):
    """`armd export`, `armd import` and `armd export` again give the same weights; the import has nothing to choose."""
    lm = small_armd.model("default")
    readable.write(readable.of(lm), configs.Config(model=lm.config), tmp_path / "first")
    command = ["export", "--format=huggingface", f"--run={tmp_path / 'first'}", f"--out={tmp_path / 'hub'}"]
    assert cli.main([*command, "--shard-size=0.00001"]) == 0
    assert "needs trust_remote_code, because aggregator=neighbours" in capsys.readouterr().out
    assert cli.main(["import", f"--from={tmp_path / 'hub'}", f"--out={tmp_path / 'second'}"]) == 0
    one, other = (_tensors(tmp_path / name) for name in ("first", "second"))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    capsys.readouterr()
    for flag in ("--two-stream=1", "--aggregator=shift", "--max-length=8"):
        assert cli.main(["import", f"--from={tmp_path / 'hub'}", f"--out={tmp_path / 'third'}", flag]) == 2
        assert f"{flag}: the source is an ARMD already" in capsys.readouterr().err


# --- native -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_imported_model_goes_back_as_what_it_was(tmp_path, pretrained):
    """A Llama, Qwen or GPT-2 that was imported with `shift` is exported under the same names with the same bits."""
    for number, name in enumerate(
        ("gpt2 untied, of another MLP", "llama with all biases", "qwen2", "qwen3", "mistral")
    ):
        config = pretrained.configs[name]
        weights = pretrained.weights(config)
        source = Folder(pretrained.write(tmp_path / f"{number}", config, weights))
        lm, _ = importing.open_model(source, two_stream_layers=number % 3, aggregator="shift")
        written = exporting.write(lm, tmp_path / f"{number}.out", Facts())
        assert written.native and not list((tmp_path / f"{number}.out").glob("*.py"))
        found = _tensors(tmp_path / f"{number}.out")
        assert found.keys() == weights.keys()
        assert all(np.array_equal(found[name], weights[name]) for name in weights)
        fields = _json(tmp_path / f"{number}.out" / "config.json")
        kind = "llama" if config["model_type"] == "mistral" else config["model_type"]
        assert fields["model_type"] == kind and "auto_map" not in fields
        assert (fields["bos_token_id"], fields["eos_token_id"]) == (268, 268)
        again, _ = importing.open_model(Folder(tmp_path / f"{number}.out"), number % 3, aggregator="shift")
        assert again.config == lm.config
        _same_params(again.load().params, lm.load().params)


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True], ids=["llama", "gpt2"])
@pytest.mark.parametrize("two_stream", [0, 1])
def test_a_model_of_our_own_is_native_if_nothing_tells_the_difference(
    tmp_path, small_armd, pretrained, learned, two_stream
):
    """With its start token in the vocabulary: log-probabilities are those of the network written from its paper."""
    lm = _autoregressive(
        small_armd, learned, two_stream_layers=two_stream, prediction_position="previous" if two_stream else "own"
    )
    assert exporting.write(readable.of(lm), tmp_path / "out", Facts()).native
    fields, weights = _json(tmp_path / "out" / "config.json"), _tensors(tmp_path / "out")
    assert not fields["tie_word_embeddings"]  # the scale of its embeddings is in one of the two tables now
    tokens = np.random.default_rng(0).integers(0, 257, (2, 24)).astype(np.int32)
    expected = lm.log_prob(tokens, order.left_to_right(2, 24))
    np.testing.assert_allclose(pretrained.log_probs(fields, weights, tokens), expected, atol=1e-4)


def _autoregressive(small_armd: Any, learned: bool, **changes: Any) -> LanguageModel:
    """A Llama or a GPT-2 of ours, whose start token is the vector of token 7."""
    shape: dict[str, Any] = {"norm": "rmsnorm", "mlp": "swiglu", "num_kv_heads": 2, "norm_epsilon": 1e-6}
    if learned:
        shape = {"learned_positions": 41, "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
    base = {"vocab_size": 257, "max_length": 40, "num_layers": 2, "width": 32, "num_heads": 4, "dtype": "float32"}
    config = ModelConfig(**(base | {"aggregator": "shift"} | shape | changes))
    lm = small_armd.of(config)
    return lm.replace(lm.params | {"start": lm.params["embedding"][7] * np.float32(32**0.5)})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aggregator": "mean"}, "aggregator=mean"),
        ({"two_stream_layers": 1, "prediction_position": "own"}, "one position before"),
        ({"logit_cap": 9.0}, "capped"),
        ({"mlp": "gelu"}, "mlp=gelu"),
        ({"norm": "layernorm"}, "mlp=swiglu"),
        ({"qk_norm": True, "norm_epsilon": 1e-5}, "epsilon"),
        ({"attention_out_bias": True}, "this combination"),
        ({"learned_positions": 41}, "learned positions"),
        ({"start": None}, "vector of no token"),
    ],
    ids=str,
)
def test_what_is_not_exactly_native_says_why(tmp_path, small_armd, changes, reason):
    """Asked for as native it is refused in one line; otherwise the reason comes with the other form."""
    own_start = "start" in changes
    changes = {name: value for name, value in changes.items() if name != "start"}
    lm = _autoregressive(small_armd, False, **({"two_stream_layers": 0} | changes))
    if own_start:
        lm = lm.replace(lm.params | {"start": lm.params["start"].at[-1].multiply(1.0001)})  # one number of it
    with pytest.raises(UserError, match=reason) as error:
        exporting.write(readable.of(lm), tmp_path / "out", Facts(), code="native")
    assert "--code=native" in str(error.value) and not list(tmp_path.iterdir())
    written = exporting.write(readable.of(lm), tmp_path / "out", Facts())
    assert not written.native and reason in written.why


# --- files ------------------------------------------------------------------------------------------------------------


def test_shards_and_their_index(tmp_path, small_armd, folder):
    """No shard is larger than asked for, unless one weight alone is; the index names every weight."""
    exporting.write(readable.of(small_armd.model("default")), tmp_path / "out", Facts(), shard_gb=2e-5)
    index, whole = _json(tmp_path / "out" / "model.safetensors.index.json"), _tensors(folder)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safetensors.safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
        held = safetensors.numpy.load_file(file)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 20_000
        for name, value in held.items():
            assert index["weight_map"].pop(name) == file.name
            np.testing.assert_array_equal(value, whole[name])
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())


@pytest.mark.slow
def test_one_weight_is_in_memory_at_a_time(tmp_path, small_armd):
    """What is allocated while weights are written is what one weight needs, neither the model nor a file of it."""
    config = ModelConfig(vocab_size=257, max_length=8, num_layers=12, two_stream_layers=6, width=128, num_heads=2)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    read = functools.partial(safetensors_format.weight, params, config)
    weights = exporting._Weights(readable.Readable(config, small_armd.model("default").tokenizer, read), None)
    exporting._write_weights(weights, tmp_path, "float32", 4 << 20)  # what is compiled once is compiled now
    tracemalloc.start()
    exporting._write_weights(weights, tmp_path, "float32", 4 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 8 << 20 and peak < 2 << 20


def test_dtypes(tmp_path, small_armd, folder):
    """Weights are rounded once, and what a dtype cannot hold is refused."""
    lm, whole = small_armd.model("default"), _tensors(folder)
    for name, kind in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        exporting.write(readable.of(lm), tmp_path / name, Facts(), dtype=name)
        assert _json(tmp_path / name / "config.json")["dtype"] == name
        with safetensors.safe_open(tmp_path / name / "model.safetensors", framework="flax") as opened:
            assert set(opened.keys()) == whole.keys()
            for key, value in whole.items():
                found = np.asarray(opened.get_tensor(key))
                assert found.dtype == kind and np.array_equal(found, value.astype(kind))
    large = lm.replace(lm.params | {"start": lm.params["start"] * 1e6})
    with pytest.raises(UserError, match="--dtype=float16: model.start has values beyond"):
        exporting.write(readable.of(large), tmp_path / "large", Facts(), dtype="float16")
    assert not (tmp_path / "large").exists()


def test_checksums_are_of_all_files(folder):
    """SHA256SUMS has every file of the folder but itself."""
    lines = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    assert lines.keys() == files and {"modeling_armd.py", "custom_generate/generate.py"} <= files
    for name, digest in lines.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_tokenizers_keep_their_ids():
    """The tokenizer.json of bytes and of a trained sentencepiece model give the ids and texts of ours."""
    documents = [file.read_text() for file in sorted(ROOT.glob("armd_jax/core/*.py"))]
    for ours in (tokenizers.BytesTokenizer(), tokenizers.SentencePieceTokenizer(train_model(documents, 700))):
        content = tokenizer_export.tokenizer_json(ours)
        theirs = library.Tokenizer.from_str(content)
        theirs.encode_special_tokens = True
        for text in (*documents, " \n\n\n x  naïve 你好\U0001f600\t", "<0x41>"):
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert ids == ours.encode(text) and theirs.decode(ids) == text
        assert theirs.token_to_id(tokenizer_export.end_token(ours)) == ours.end_of_text


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_cites_what_citation_cff_says():
    """Title, authors, year, volume, address, version and licence."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = cff["references"]
    people = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    wanted = [paper["title"], " and ".join(people), paper["year"], paper["volume"], paper["url"]]
    wanted += [paper["conference"]["name"], cff["version"], cff["license"], cff["authors"][0]["name"]]
    wanted += [cff["title"], paper["collection-title"]]
    assert not [each for each in wanted if str(each) not in card.CITATION]


@pytest.mark.slow
def test_the_card_of_a_run_says_what_is_known(tmp_path, smoke_run, capsys):
    """Data, orders, steps and likelihoods of the run, without a folder of this machine."""
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run)
    score = {"nats_per_token": 1.25, "bits_per_byte": 0.75}
    (run / "eval.json").write_text(json.dumps({"split": "valid", "lossless": True, "left_to_right": score}))
    assert cli.main(["export", "--format=huggingface", f"--run={run}", f"--out={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    config = configs.read(run)
    assert f"| steps | {config.training.num_steps:,} |" in text and "`text.jsonl`" in text and "documents" in text
    assert "| left to right (exact) | 1.2500 | 0.7500 |" in text and "| orders | " in text
    assert str(tmp_path) not in text and str(smoke_run.parent) not in text
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "text-generation"


# --- the page ---------------------------------------------------------------------------------------------------------


def _table() -> list[str]:
    """The rows of the page's table, from the tables of names."""
    base = ModelConfig(vocab_size=9, num_layers=1, two_stream_layers=0, norm="layernorm", qk_norm=True)
    full = dataclasses.replace(base, qkv_bias=True, attention_out_bias=True, mlp_bias=True, tie_embeddings=False)
    wide = dataclasses.replace(full, mlp="swiglu", learned_positions=2048, neighbours="both")
    found: dict[str, dict[str, str]] = {}
    plain = dataclasses.replace(wide, positional_gain=0.0)
    alone = dataclasses.replace(wide, aggregator="positional")
    for column, config in itertools.product(("armd",), (wide, plain, alone)):
        for entry in names.table(column, config):
            found.setdefault(_words(entry.ours), {})[column] = _words(entry.theirs)
    rows = [f"| {ours} | {theirs['armd']} |" for ours, theirs in found.items()]
    gpt2 = names.table("gpt2", dataclasses.replace(full, qk_norm=False, learned_positions=2048))
    return [*rows, *(f"| {_words(entry.ours)} | {_words(entry.theirs)} |" for entry in gpt2)]


def _words(each: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in each).replace("layers.0.", "layers.<i>.").replace(".h.0.", ".h.<i>.")


def test_the_page_has_the_table_of_names():
    """Every row of the tables of names is on the page, and no other."""
    page = (ROOT / "experiments" / "TRANSFORMERS.md").read_text()
    lines = page.split("## Names of weights")[1].splitlines()
    assert [line for line in lines if line.startswith("| `")] == _table()
