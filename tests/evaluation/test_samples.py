"""Samples: what is given stays as it is, what is drawn has its call, and settings are recorded."""

import dataclasses

import pytest

from armd_jax.errors import UserError
from armd_jax.evaluation import samples
from armd_jax.evaluation.results import Samples

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
def test_samples_record_what_was_drawn_and_how(lm):
    """Every number of streams has its batch; texts, tokens, pieces and calls fit one another and the settings."""
    drawn = samples.draw(lm, (1, 2), batch=2, length=8, top_k=5, prompt="ab", suffix="c", seed=3)
    assert isinstance(drawn, Samples) and drawn.hardware
    assert (drawn.length, drawn.batch, drawn.temperature, drawn.top_k, drawn.top_p, drawn.seed) == (
        8,
        2,
        1.0,
        5,
        None,
        3,
    )
    assert [sample.streams for sample in drawn.samples] == [1, 1, 2, 2]
    for sample in drawn.samples:
        assert len(sample.tokens) == len(sample.pieces) == len(sample.calls) == 8
        assert sample.num_calls == sample.streams + -(-5 // sample.streams) - 1 == max(sample.calls)
        assert [index for index, call in enumerate(sample.calls) if call == 0] == [0, 1, 7]
        assert sample.text == lm.tokenizer.decode(sample.tokens)
        assert sample.pieces[:2] == ("a", "b") and sample.pieces[-1] == "c"
        assert sample.tokens_per_second > 0
    text = samples.as_text(drawn)
    assert text.count("S = 1: 5 network calls (NFE)") == text.count("S = 2: 4 network calls (NFE)") == 2


def test_texts_that_do_not_fit_are_an_error(lm):
    with pytest.raises(UserError, match=r"their 5 \+ 4 tokens are longer than length=8"):
        samples.draw(lm, (1,), batch=1, length=8, prompt="abcde", suffix="fghi")
    with pytest.raises(UserError, match="no tokenizer"):
        samples.draw(dataclasses.replace(lm, tokenizer=None), (1,), batch=1, length=8)
