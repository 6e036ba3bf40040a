"""Which judge a folder holds: models of this package, imports made on the fly, and what only transformers can read."""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest
import safetensors.numpy

from armd_jax import order
from armd_jax.config import Config, ModelConfig
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.evaluation import generative_opening
from armd_jax.evaluation.generative_judge import Judge, OwnJudge
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import readable
from armd_jax.interop.huggingface import exporting
from armd_jax.interop.huggingface.card import Facts
from armd_jax.order_config import OrderConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXTS = [[*b"the old river"], [*b"a stone", 256, *b"bird"], [*b"o"]]
LLAMA = ModelConfig(
    vocab_size=257,
    max_length=24,
    num_layers=2,
    two_stream_layers=0,
    aggregator="shift",
    width=32,
    num_heads=4,
    num_kv_heads=2,
    norm="rmsnorm",
    norm_epsilon=1e-6,
    mlp="swiglu",
    dtype="float32",
)


@pytest.fixture(scope="module")
def llama(lm) -> LanguageModel:
    """An untrained Llama, whose texts begin with token 7."""
    made = LanguageModel.create(LLAMA, 1)
    start = made.params["embedding"][7] * np.float32(32**0.5)
    return dataclasses.replace(made.replace(made.params | {"start": start}), tokenizer=lm.tokenizer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, llama) -> dict[str, pathlib.Path]:
    """The same model as an export of ours, and as a folder of Hugging Face."""
    place = tmp_path_factory.mktemp("judges")
    config = Config(model=LLAMA, order=OrderConfig(kind="left_to_right"))
    readable.write(readable.of(llama), config, place / "armd")
    assert exporting.write(readable.of(llama), place / "imported", Facts()).native
    return {name: place / name for name in ("armd", "imported")}


def _expected(llama: LanguageModel) -> list[float]:
    return [
        -float(np.asarray(llama.log_prob(np.asarray([text]), order.left_to_right(1, len(text))), np.float64).sum())
        for text in TEXTS
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["armd", "imported"])
def test_a_folder_is_opened_for_what_it_is(folders, llama, kind):
    """An export of ours, and a folder of Hugging Face without torch: same log-probabilities, kind and context told."""
    judge = generative_opening.open_judge(folders[kind], 2)
    facts = judge.facts
    assert (facts.kind, facts.context, facts.name) == (kind, 24, str(folders[kind]))
    assert judge.tokenizer_hash == llama.tokenizer.hash and judge.encode(["ab", ""]) == [97, 98, 256]
    np.testing.assert_allclose(judge.score(TEXTS, False).nats_T, _expected(llama), rtol=1e-5)


def test_a_judge_scores_rows_as_it_was_trained(tmp_path, llama):
    """An export keeps whether documents were kept apart, and texts are scored so."""
    config = Config(model=LLAMA, order=OrderConfig(kind="left_to_right"), data=DataConfig(reset="document"))
    readable.write(readable.of(llama), config, tmp_path / "armd")
    judge = generative_opening.open_judge(tmp_path / "armd", 2)
    assert isinstance(judge, OwnJudge) and judge.reset == "document"


def _odd(folder: pathlib.Path, **fields: object) -> pathlib.Path:
    """A folder of another architecture."""
    folder.mkdir()
    safetensors.numpy.save_file({"weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "vocab_size": 9} | fields))
    return folder


def test_what_cannot_be_imported_needs_an_extra(tmp_path, monkeypatch):
    """One line that says why, and which extra may help. No code of the folder is run in any case."""
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"gpt_neox.*pip install -e '.\[judge\]'") as error:
        generative_opening.open_judge(_odd(tmp_path / "odd"), 2)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="there is no such folder"):
        generative_opening.open_judge(tmp_path / "nowhere", 2)


def test_a_denoiser_is_no_judge(tmp_path, lm):
    """It gives no text a probability."""
    config = ModelConfig(
        kind="denoiser", vocab_size=257, max_length=8, num_layers=1, two_stream_layers=0, width=16, num_heads=2
    )
    model = dataclasses.replace(LanguageModel.create(config), tokenizer=lm.tokenizer)
    readable.write(readable.of(model), Config(model=config, order=OrderConfig(sbp_steps=0)), tmp_path / "denoiser")
    with pytest.raises(UserError, match="a denoiser .* gives no text a probability"):
        generative_opening.open_judge(tmp_path / "denoiser", 2)


@pytest.mark.slow
def test_transformers_agrees(tmp_path, folders, llama):
    """The same weights, computed by transformers: nats to 1e-4, mean hidden states too; foreign code is refused."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers are not installed")
    from armd_jax.evaluation import generative_transformers

    with pytest.raises(UserError, match="asks for code of its own"):
        generative_opening.open_judge(_odd(tmp_path / "odd", auto_map={"AutoConfig": "x.X"}), 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["imported"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["imported"])
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    theirs: Judge = generative_transformers.open_judge(tmp_path / "theirs", "theirs", 2, "a reason")
    assert theirs.facts.kind == "transformers" and theirs.facts.context == 24
    assert theirs.encode(["ab", "c"]) == [97, 98, 256, 99]
    own = generative_opening.open_judge(folders["imported"], 2)
    ours = own.score(TEXTS, True)
    found = theirs.score(TEXTS, True)
    np.testing.assert_allclose(found.nats_T, ours.nats_T, rtol=1e-4)
    np.testing.assert_allclose(found.features_TD, ours.features_TD, atol=1e-3)
    np.testing.assert_allclose(found.nats_T, _expected(llama), rtol=1e-4)
    short = (dataclasses.replace(one, facts=dataclasses.replace(one.facts, context=6)) for one in (theirs, own))
    one, two = (judge.score(TEXTS, True) for judge in short)
    assert one.windows_T.tolist() == two.windows_T.tolist() == [4, 3, 1]
    np.testing.assert_allclose(one.nats_T, two.nats_T, rtol=1e-4)
    np.testing.assert_allclose(one.features_TD, two.features_TD, atol=1e-3)
    # A text may spell a special token without being one; the judge is another if its tokenizer is.
    spelled = tokenizer.eos_token
    assert spelled and 256 not in theirs.encode([f"a{spelled}b"]) and tokenizer.encode(spelled) == [256]
    same = generative_transformers.open_judge(tmp_path / "theirs", "./theirs", 2, "a reason").facts
    file = tmp_path / "theirs" / "tokenizer_config.json"
    file.write_text(file.read_text() + "\n")
    other = generative_transformers.open_judge(tmp_path / "theirs", "theirs", 2, "a reason").facts
    assert same == theirs.facts and other.digest != theirs.facts.digest


@pytest.mark.slow
def test_what_transformers_cannot_judge_with(tmp_path, folders):
    """One line each: weights that are missing, a model that looks ahead, a damaged file, no context anywhere."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers are not installed")
    from armd_jax.evaluation import generative_transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["imported"])
    tokenizer.model_max_length = int(1e30)
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 1}

    def saved(kind: str, **fields: object) -> pathlib.Path:
        config = getattr(transformers, f"{kind}Config")(**sizes, **ends, **fields)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    def refusal(folder: pathlib.Path) -> str:
        with pytest.raises(UserError) as error:
            generative_transformers.open_judge(folder, "theirs", 2, "a reason")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is not causal" in refusal(saved("Roberta", intermediate_size=16, max_position_embeddings=32))
    neox = saved("GPTNeoX", intermediate_size=16, max_position_embeddings=32)
    assert generative_transformers.open_judge(neox, "theirs", 2, "a reason").facts.context == 32
    file = neox / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    head = next(key for key in weights if "embed_out" in key or "lm_head" in key)
    safetensors.numpy.save_file({k: v for k, v in weights.items() if k != head}, file, {"format": "pt"})
    assert "1 weights are missing, of which the first is" in refusal(neox)
    file.write_bytes(file.read_bytes()[:-100])
    assert "transformers cannot read it" in refusal(neox)
    assert "says nowhere how many tokens it sees" in refusal(saved("Bloom"))
    bloom = saved("Bloom", seq_length=64)
    assert generative_transformers.open_judge(bloom, "theirs", 2, "a reason").facts.context == 64
