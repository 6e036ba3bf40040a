"""The picture of generation metrics: every way of writing has a colour, and real text is there."""

import io

import numpy as np

from armd_jax.evaluation.generative_results import Entry, JudgedBy
from armd_jax.report import frontier, style

JUDGE = JudgedBy(name="judge", kind="armd", digest="0", context=64, retokenised=False, first_token="its start token")


def _entry(**changes) -> Entry:
    how = dict(samples=4, length=8, batch=2, seed=0, weights="0", judge=JUDGE, temperature=1.0, mode="strided")
    how |= dict(streams=1, generative_perplexity=30.0, standard_error=2.0, entropy_nats=4.0, tokens_per_second=100.0)
    return Entry(**(how | changes))


def test_every_way_of_writing_has_its_colour():
    """Two numbers of streams at two temperatures, and real text; figures that are not known leave a point out."""
    from matplotlib import colors, image

    entries = [
        _entry(streams=streams, temperature=temperature, entropy_nats=3 + temperature + streams / 10)
        for streams in (1, 2)
        for temperature in (0.5, 1.0)
    ]
    real = _entry(text="test split", mode=None, streams=None, temperature=None, tokens_per_second=0.0)
    broken = _entry(streams=4, generative_perplexity=None)
    pixels = image.imread(io.BytesIO(frontier.picture([*entries, real, broken])))[..., :3]

    def count(color: str) -> int:
        return int((np.abs(pixels - np.array(colors.to_rgb(color))).max(axis=-1) < 0.01).sum())

    assert count(style.BLUE) > 50 and count(style.ORANGE) > 50 and count(style.INK) > 50
    assert count(style.VERMILLION) == 0
