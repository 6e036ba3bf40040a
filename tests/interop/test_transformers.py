"""What Hugging Face transformers make of exports: the same numbers and the same texts. Skipped without PyTorch."""

import json
import pathlib
import types
from typing import Any

import jax
import numpy as np
import pytest

from armd_jax import order
from armd_jax.data import tokenizers
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import importing, readable
from armd_jax.interop.huggingface import exporting
from armd_jax.interop.huggingface.card import Facts
from armd_jax.interop.huggingface.source import Folder

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers are not installed")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

VOCAB, NEW = 257, 11
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, 16)).astype(np.int32)
IDS = torch.from_numpy(TOKENS).long()
NO_END = {"eos_token_id": -1}


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The code of folders is copied into a cache of this test."""
    patch = pytest.MonkeyPatch()
    patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    patch.syspath_prepend(transformers.dynamic_module_utils.HF_MODULES_CACHE)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, small_armd: types.SimpleNamespace) -> Any:
    """exported(name): our model, its folder and the model of transformers."""
    made: dict[str, tuple[LanguageModel, pathlib.Path, Any]] = {}

    def get(name: str) -> tuple[LanguageModel, pathlib.Path, Any]:
        if name not in made:
            lm, folder = small_armd.model(name), tmp_path_factory.mktemp("export") / f"model_{len(made)}"
            exporting.write(readable.of(lm), folder, Facts(), code="remote")
            made[name] = lm, folder, _load(folder)
        return made[name]

    return get


def _load(folder: pathlib.Path, **how: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how).eval()


NAMES = ("default", "positional", "mean", "shift", "both neighbours", "learned positions", "scaled RoPE")


def test_every_small_model_is_tried(small_armd):
    """The names above are those of `small_armd`."""
    assert tuple(small_armd.configs) == NAMES


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_and_log_probs_are_ours(exported, name):
    """Left to right, in streams, and in blocks of a masked diffusion: to 1e-4, and as a rule to 1e-5."""
    lm, _, model = exported(name)
    natural = order.left_to_right(2, 16)
    ours = np.asarray(lm.logits(TOKENS, natural))[..., :VOCAB]
    assert np.abs(model(IDS).logits[:, :-1].numpy() - ours[:, 1:]).max() <= 1e-4
    assert np.abs(model.log_prob(IDS).numpy() - lm.log_prob(TOKENS, natural)).max() <= 1e-4
    diffused = order.masked_diffusion(jax.random.key(3), 2, 16, 6)
    for drawn in (order.strided(2, 16, 4), diffused):
        blocks = [torch.from_numpy(np.array(array)).long() for array in (drawn.positions_BN, drawn.block_BN)]
        ours = np.asarray(lm.logits(TOKENS, drawn))[..., :VOCAB]
        assert np.abs(model(IDS, order=blocks).logits.numpy() - ours).max() <= 1e-4
        assert np.abs(model.log_prob(IDS, *blocks).numpy() - lm.log_prob(TOKENS, drawn)).max() <= 1e-4
    shared = model.log_prob(IDS, blocks[0][0], blocks[1][0])  # one order for all rows
    np.testing.assert_allclose(shared[0], model.log_prob(IDS, *blocks)[0], atol=1e-5)


# Without M, with all layers in M, with and without state beside the keys: each with all that decoding can need.
@pytest.mark.parametrize("name", ["default", "positional", "mean", "shift"])
def test_greedy_texts_are_ours(exported, name):
    """One stream by the usual method with its cache, four by the folder's own."""
    lm, _, model = exported(name)
    prompt = IDS[:, :5]
    for streams in (1, 4):
        ours = _greedy(lm, TOKENS[:, :5], streams)
        how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, **NO_END}
        how |= {"streams": streams} if streams > 1 else {}
        np.testing.assert_array_equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), **how), ours)


def _greedy(lm: LanguageModel, prompt: np.ndarray, streams: int) -> np.ndarray:
    return lm.generate(prompt=prompt, max_new_tokens=NEW, temperature=0, streams=streams, stop_at_end=False).tokens_BN


def test_greedy_texts_of_all_prompts(exported):
    """Prompts of two lengths, and none; and the folder's method by its name."""
    lm, folder, model = exported("both neighbours")
    prompt, mask = IDS[:, :5], torch.ones_like(IDS[:, :5])
    mask[0, :2] = 0
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, **NO_END}
    for streams, more in ((1, {}), (4, {"streams": 4}), (4, {"streams": 4, "custom_generate": str(folder)})):
        trusted = {"trust_remote_code": True} if "custom_generate" in more else {}
        padded = model.generate(prompt, attention_mask=mask, **how, **more, **trusted)
        np.testing.assert_array_equal(padded[0, 2:], _greedy(lm, TOKENS[:1, 2:5], streams)[0])
        np.testing.assert_array_equal(padded[1], _greedy(lm, TOKENS[1:, :5], streams)[0])
    alone = lm.generate(1, 12, temperature=0, streams=3, stop_at_end=False).tokens_BN
    np.testing.assert_array_equal(model.generate(max_new_tokens=12, streams=3, **NO_END), alone)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(exported):
    """Logits at tokens are those of the text alone; without a cache they are the same as with one."""
    _, _, model = exported("both neighbours")
    alone = model(IDS[:1, :9]).logits
    for left in (0, 4):
        ids, mask = torch.full((1, 13), 99), torch.zeros((1, 13), dtype=torch.long)
        ids[:, left : left + 9], mask[:, left : left + 9] = IDS[:1, :9], 1
        found = model(ids, attention_mask=mask, use_cache=False).logits[:, left : left + 9]
        np.testing.assert_allclose(found, alone, atol=1e-5)


@torch.no_grad()
def test_the_cache_can_be_cut_and_goes_on(exported):
    """A cache holds as many tokens as it was given: it is continued, and cut, as those of other models are."""
    _, _, model = exported("default")
    cache = transformers.DynamicCache(config=model.config)
    model(IDS[:, :10], past_key_values=cache)
    assert cache.get_seq_length() == 10
    cache.crop(-4)
    found = model(IDS[:, 6:12], past_key_values=cache).logits
    np.testing.assert_allclose(found, model(IDS[:, :12]).logits[:, 6:], atol=1e-5)
    beams = model.generate(IDS[:1, :4], max_new_tokens=6, num_beams=3, do_sample=False, **NO_END)
    assert beams.shape == (1, 10)


def test_the_loss_is_that_of_the_next_token_and_trains(exported):
    """The loss is the mean over tokens 1 .. N - 1, labels of -100 left out; its gradient reaches every weight."""
    _, folder, _ = exported("positional")
    model = _load(folder)
    labels = IDS.clone()
    labels[0, 3] = -100
    loss = model(IDS, labels=labels).loss
    with torch.no_grad():
        each = -model.log_prob(IDS)[:, 1:]
    each[0, 2] = float("nan")
    assert loss.item() == pytest.approx(each.nanmean().item(), abs=1e-5)
    loss.backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum()]


def test_sampling_follows_its_arguments(exported):
    """Samples of a seed come again, the least top-k and top-p are greedy, and an end of text ends the text."""
    _, _, model = exported("default")
    how: dict[str, Any] = {"max_new_tokens": 12, "streams": 4, "do_sample": True, **NO_END}
    torch.manual_seed(0)
    one = model.generate(IDS[:, :4], **how)
    torch.manual_seed(0)
    assert torch.equal(one, model.generate(IDS[:, :4], **how))
    greedy = model.generate(IDS[:, :4], **how | {"do_sample": False})
    assert not torch.equal(one, greedy)
    for least in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert torch.equal(model.generate(IDS[:, :4], **how, **least), greedy)
    end = int(greedy[0, 8])
    ended = model.generate(IDS[:1, :4], **how | {"do_sample": False, "eos_token_id": end, "pad_token_id": 0})
    first = 4 + int((greedy[0, 4:] == end).nonzero()[0, 0])
    assert torch.equal(ended[0, : first + 1], greedy[0, : first + 1]) and not ended[0, first + 1 :].any()


def test_mistakes_are_errors(exported):
    """Orders that are none, texts that are too long and padding on the wrong side are refused."""
    _, _, model = exported("default")
    places = torch.arange(16)
    for positions, blocks in ((places * 0, places + 1), (places, places), (places, places * 2 + 1)):
        with pytest.raises(ValueError, match=r"positions|blocks"):
            model.log_prob(IDS, positions, blocks)
    with pytest.raises(ValueError, match="exceed 32"):
        model.generate(IDS, max_new_tokens=17, streams=2)
    mask = torch.ones_like(IDS)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="left"):
        model.generate(IDS, attention_mask=mask, max_new_tokens=4, streams=2)


@torch.no_grad()
def test_shards_dtypes_and_tokenizer(tmp_path, exported):
    """A folder in shards and in bfloat16 loads, is close, and comes with its tokenizer."""
    lm, _, model = exported("default")
    exporting.write(readable.of(lm), tmp_path / "half", Facts(), dtype="bfloat16", shard_gb=1e-5)
    half = _load(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16 and len(list((tmp_path / "half").glob("*.safetensors"))) > 3
    gap = (half.log_prob(IDS) - model.log_prob(IDS)).abs()
    assert gap.mean() < 0.1
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "half", trust_remote_code=True)
    text = "The old tree, naïve\n\n  你好"
    assert tokenizer(text).input_ids == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == tokenizers.BytesTokenizer.end_of_text
    model.save_pretrained(tmp_path / "again")
    again = _load(tmp_path / "again")
    torch.testing.assert_close(again.log_prob(IDS), model.log_prob(IDS), rtol=0, atol=0)


@torch.no_grad()
def test_native_models_load_without_code(tmp_path, pretrained):
    """Each as the class of transformers, without trust, with the log-probabilities of ours to 1e-4."""
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    classes |= {"mistral": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}
    tokens = np.random.default_rng(0).integers(0, 260, (2, 20)).astype(np.int32)
    for number, name in enumerate(("gpt2", "llama with all biases", "llama 3", "qwen2", "qwen3", "mistral")):
        config = pretrained.configs[name]
        source = Folder(pretrained.write(tmp_path / f"{number}", config))
        opened, _ = importing.open_model(source, two_stream_layers=1, aggregator="shift")
        lm = opened.load()
        assert exporting.write(opened, tmp_path / f"{number}.out", Facts()).native
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}.out").eval()
        assert type(model).__name__ == classes[config["model_type"]]
        bos = json.loads((tmp_path / f"{number}.out" / "config.json").read_text())["bos_token_id"]
        ids = torch.from_numpy(np.concatenate([np.full((2, 1), bos), tokens], axis=1)).long()
        log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        assert np.abs(log_p.numpy() - lm.log_prob(tokens, order.left_to_right(2, 20))).max() <= 1e-4
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / f"{number}.out")
        assert tokenizer("It's 99% of them").input_ids == lm.tokenizer.encode("It's 99% of them")
