"""The benchmark's load in a short form: many clients at once, some of whom are killed."""

import pytest

from armd_jax.inference.schedule import FREE
from armd_jax.serving.batching import Asked

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def test_no_answer_is_wrong_or_lost(serve, client):
    """24 clients for 3 seconds at a queue of 8: every answer is the library's text, and the others are refused."""
    with serve(max_queue=8) as served:
        jobs = client.make_jobs(served.lm, 48, 8, [1], [0.7, 1.0], batch=4)
        for rows in (1, 4):  # compiles
            next(served.batcher.steps([Asked((0, *[FREE] * 20), 0)] * rows))
        found = client.put_under_load(served.url, jobs, 24, 3.0)
        free = client.is_free(served.url)
    assert not found.wrong and not found.lost and free
    assert len(found.seconds) > 24 and found.refused > 0 and found.killed > 0
