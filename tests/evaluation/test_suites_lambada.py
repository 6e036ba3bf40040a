"""LAMBADA's last words: decisions and nats of a plain loop, and where passages are cut."""

import numpy as np
import pytest

from armd_jax import order
from armd_jax.errors import UserError
from armd_jax.evaluation import suites_lambada
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop.load import load

pytestmark = pytest.mark.usefixtures("quick_compilation")

WORDS = ("the", "a", "river", "stone", "light", "moves", "under", "slowly", "and", "bird", "tree", "sees", "old", "new")


def _next(lm: LanguageModel, ids: list[int]) -> np.ndarray:
    """Logits of the token behind `ids`, float64."""
    row = np.zeros((1, lm.config.max_length), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(lm.logits(row, order.left_to_right(*row.shape)), np.float64)[0, len(ids)]


def _greedy(lm: LanguageModel, ids: list[int], count: int) -> list[int]:
    """The `count` tokens that greedy decoding writes, one call of the model for each."""
    written: list[int] = []
    for _ in range(count):
        written.append(int(np.argmax(_next(lm, ids + written))))
    return written


def _nats(lm: LanguageModel, ids: list[int], target: list[int]) -> float:
    """Nats of some tokens, one call of the model for each."""
    total = 0.0
    for place, token in enumerate(target):
        logits = _next(lm, ids + target[:place])
        total += float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token])
    return total


@pytest.mark.slow
def test_accuracy_is_that_of_a_plain_loop(smoke_run):
    """20 passages, each decoded token by token; many end with a word that the model would write itself."""
    lm, rng = load(smoke_run), np.random.default_rng(3)
    passages = []
    for number in range(20):
        context, word = " ".join(rng.choice(WORDS, rng.integers(2, 6))), str(rng.choice(WORDS))
        likely = lm.tokenizer.decode(_greedy(lm, lm.tokenizer.encode(context), 4)).split()
        passages.append((context, likely[0] if likely and number % 4 else word))
    tokens = [(lm.tokenizer.encode(context), lm.tokenizer.encode(" " + word)) for context, word in passages]
    expected = [_greedy(lm, ids, len(target)) == target for ids, target in tokens]
    nats = [_nats(lm, ids, target) for ids, target in tokens]
    assert 3 <= sum(expected) <= 17 and max(len(target) for _, target in tokens) > 1  # or the test would say little
    records = [" ".join(passage) for passage in passages]
    found = suites_lambada.last_word(lm, lm.tokenizer, records, "here", batch_size=3, progress=False)
    assert found.correct == sum(expected) and found.passages == 20 and not found.cut
    assert found.accuracy == sum(expected) / 20
    decisions = suites_lambada._score(lm, suites_lambada.passages(records, lm.tokenizer)[0])
    assert [right for _, right in decisions] == expected
    np.testing.assert_allclose([its for its, _ in decisions], nats, rtol=1e-4)
    np.testing.assert_allclose(found.perplexity_per_word, np.exp(np.mean(nats)), rtol=1e-4)


def test_passages_are_cut_at_their_last_space():
    """With straight quotes; the space belongs to the word. A passage of one word has nothing to tell it from."""
    assert suites_lambada.cut_last_word(" “Why?” asked the\nold  dog \n") == ('"Why?" asked the\nold', " dog")
    with pytest.raises(UserError, match="'alone' has no last word"):
        suites_lambada.cut_last_word("alone")


def test_a_word_has_the_tokens_that_it_has_in_its_passage():
    """A tokenizer that puts a space before every text, as those of Llama do, would put one more before the word."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {symbol: number for number, symbol in enumerate("▁abcd")}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    changes = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    model.normalizer = tokenizers.normalizers.Sequence(changes)

    class Llama:
        def encode_batch(self, texts):
            return [encoding.ids for encoding in model.encode_batch(texts)]

    assert Llama().encode_batch([" cd"]) == [[0, 0, 3, 4]]
    assert suites_lambada.passages(["ab a cd"], Llama())[0] == [([0, 1, 2, 0, 1], [0, 3, 4])]
    model.normalizer = None  # now a space has no token either
    assert suites_lambada.passages(["ab xy", "ab cd"], Llama())[0] == [([1, 2], [3, 4])]  # nothing to tell: left out


def test_a_passage_of_one_word_is_named(lm):
    """By its file and number, before anything is measured."""
    with pytest.raises(UserError, match="here: passage 2: 'alone' has no last word"):
        suites_lambada.last_word(lm, lm.tokenizer, ["an old dog", "alone"], "here", progress=False)


@pytest.mark.slow
def test_long_passages_lose_their_beginning(lm):
    """And the form that a passage is in is told."""
    short, long = "an old dog", "the river , moves slowly under the old stone"
    found = suites_lambada.last_word(lm, lm.tokenizer, [short, long, long], "here", progress=False)
    assert found.cut == 2 and found.tokenized and found.tokens == 4 + 6 + 6
    again = suites_lambada.last_word(lm, lm.tokenizer, [long[-16:]], "here", progress=False)
    both = suites_lambada.last_word(lm, lm.tokenizer, [long], "here", progress=False)
    assert not again.tokenized
    np.testing.assert_allclose(again.perplexity_per_word, both.perplexity_per_word, rtol=1e-5)
