"""Training of sentencepiece: repeatable, from text of any size, and able to spell any other text."""

import pytest

from armd_jax.data import sentencepiece_training
from armd_jax.data.corpora import open_corpus
from armd_jax.data.manifest import TrainingSample
from armd_jax.data.sentencepiece_training import train_model
from armd_jax.data.tokenizers import SentencePieceTokenizer
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError


@pytest.fixture(scope="module")
def corpus():
    return open_corpus(DataConfig())


@pytest.mark.slow
def test_training_is_repeatable_and_compresses(corpus):
    model = train_model(corpus.documents("train"), 1024)
    assert train_model(corpus.documents("train"), 1024) == model
    tokenizer = SentencePieceTokenizer(model)
    text = "".join(corpus.documents("valid"))
    assert tokenizer.vocab_size == 1024 and len(tokenizer.encode(text)) < 0.45 * len(text.encode())


def test_training_text_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr(sentencepiece_training, "TRAINING_BYTES", 1000)
    lines, sample = sentencepiece_training.sample_lines(f"{index:09d}\n" for index in range(10_000))
    steps = {int(b) - int(a) for a, b in zip(lines, lines[1:], strict=False)}
    assert sum(map(len, lines)) <= 1000 and len(steps) == 1 and int(lines[-1]) > 9000
    assert sample == TrainingSample(every=steps.pop(), bytes=sum(map(len, lines)), largest=1000)


def test_vocabulary_larger_than_the_text_shrinks_and_one_too_small_is_an_error(corpus):
    small = SentencePieceTokenizer(train_model(["hello world, hello there"] * 3, 5000))
    assert 256 < small.vocab_size < 400 and small.decode(small.encode("caf\u00e9 \u2581")) == "caf\u00e9 \u2581"
    with pytest.raises(UserError, match=r"data.vocab_size=270: .* alone need \d+"):
        train_model(corpus.documents("valid"), 270)


def test_vocabulary_of_text_without_spaces_can_spell_a_space():
    tokenizer = SentencePieceTokenizer(train_model(["one\ntwo\n\nthree"] * 9, 300))
    assert tokenizer.lossless and tokenizer.decode(tokenizer.encode("one two \u2581 ")) == "one two \u2581 "
