"""Batches: who shares one, what each text gets, and that nothing is written for nobody."""

import asyncio
import dataclasses

import numpy as np
import pytest

from armd_jax.inference.draw import GREEDY
from armd_jax.inference.schedule import FREE
from armd_jax.serving.batching import Asked, Batcher, Closed, QueueFull, Ticket

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

ONE = Asked(known=(97, *[FREE] * 6), seed=1, stop_at_end=False)


async def _end(*tickets: Ticket) -> None:
    """Waits until all texts are over."""
    for ticket in tickets:
        while not all(text.over for text in ticket.texts):
            await ticket.changed.wait()
            ticket.changed.clear()


def _run(lm, scenario, max_batch: int = 4, max_queue: int = 64) -> Batcher:
    """Runs a scenario of a batcher that has not been started, and ends the batcher."""
    batcher = Batcher(lm, max_batch, max_queue)

    async def run() -> None:
        await asyncio.wait_for(scenario(batcher), 120)

    try:
        asyncio.run(run())
    finally:
        batcher.close()
        if batcher._thread.is_alive():
            batcher.join()
    return batcher


def _sizes(batcher: Batcher) -> tuple[int, float]:
    """The number of batches, and of the texts in them."""
    rows = batcher.metrics.batch_rows.collect()[0].samples
    found = {sample.name.removeprefix("armd_batch_rows_"): sample.value for sample in rows}
    return int(found["count"]), found["sum"]


def test_texts_of_a_batch_are_those_of_the_library(lm):
    """Lengths, seeds, temperatures, nuclei and numbers of streams side by side: each text is what it is alone."""
    asked = [
        Asked((97, *[FREE] * size), seed, temperature, top_p, streams=streams, stop_at_end=False)
        for seed, (size, temperature, top_p, streams) in enumerate(
            [
                (3, 1.0, 1.0, 1),
                (20, 0.5, 1.0, 1),
                (9, 1.0, 1.0, 1),
                (9, 0.0, 1.0, 1),
                (9, 1.0, 0.5, 1),
                (9, 2.0, 1.0, 3),
            ]
        )
    ]

    async def scenario(batcher: Batcher) -> None:
        tickets = [Ticket([each]) for each in asked]
        for ticket in tickets:
            batcher.submit(ticket)
        batcher.start()
        await _end(*tickets)
        for each, ticket in zip(asked, tickets, strict=True):
            how = dict(temperature=each.temperature, top_p=each.top_p, streams=each.streams, stop_at_end=False)
            alone = lm.generate(evidence_BN=[each.known], seed=[each.seed], **how)
            progress = ticket.texts[0].progress
            np.testing.assert_array_equal(progress.tokens_N, alone.tokens_BN[0])
            np.testing.assert_array_equal(progress.call_N, alone.call_BN[0])
            np.testing.assert_allclose(progress.log_prob_N, alone.log_prob_BN[0], atol=1e-4)
            assert progress.finished and progress.end == len(each.known)

    assert _sizes(_run(lm, scenario)) == (4, 6)  # three share one


def test_what_draws_the_likeliest_token_shares_no_batch_with_what_does_not(lm):
    """A temperature that is too small for anything else is greedy; the least that is not shares the batch of 1."""
    asked = [dataclasses.replace(ONE, temperature=temperature) for temperature in (1.0, GREEDY / 10, 0.0, GREEDY)]

    async def scenario(batcher: Batcher) -> None:
        tickets = [Ticket([each]) for each in asked]
        for ticket in tickets:
            batcher.submit(ticket)
        batcher.start()
        await _end(*tickets)
        assert [ticket.texts[0].failure for ticket in tickets] == [None] * 4

    assert _sizes(_run(lm, scenario)) == (2, 4)


def test_a_short_text_does_not_wait_for_a_long_one(lm):
    """Neither in the batch of the long one, nor in the next batch."""

    async def scenario(batcher: Batcher) -> None:
        long = dataclasses.replace(ONE, known=(97, *[FREE] * 60))
        greedy = dataclasses.replace(ONE, temperature=0.0)  # has to be in another batch
        first, second, third = Ticket([long]), Ticket([ONE]), Ticket([greedy])
        for ticket in (first, second, third):
            batcher.submit(ticket)
        batcher.start()
        await _end(second, third)
        assert not first.texts[0].over
        await _end(first)

    assert _sizes(_run(lm, scenario)) == (2, 3)


def test_a_queue_that_is_full_takes_all_or_nothing(lm):
    """And takes again what fits once somebody has left it."""

    async def scenario(batcher: Batcher) -> None:
        first, second = Ticket([ONE] * 3), Ticket([ONE] * 2)
        batcher.submit(first)
        with pytest.raises(QueueFull):
            batcher.submit(second)
        assert batcher.num_waiting() == 3
        batcher.drop(first)
        batcher.submit(second)
        assert batcher.num_waiting() == 2
        batcher.start()
        await _end(second)
        assert first.texts[0].progress is None

    _run(lm, scenario, max_queue=4)


def test_nothing_is_written_for_nobody(lm):
    """A batch ends when the last of its readers has left."""
    whole = 60

    async def scenario(batcher: Batcher) -> None:
        ticket = Ticket([dataclasses.replace(ONE, known=(97, *[FREE] * whole))] * 2)
        batcher.submit(ticket)
        batcher.start()
        await ticket.changed.wait()
        batcher.drop(ticket)
        other = Ticket([ONE])
        batcher.submit(other)
        await _end(other)
        while batcher.num_active():
            await asyncio.sleep(0.01)

    batcher = _run(lm, scenario)
    drawn = batcher.metrics.tokens.labels("generated")._value.get()
    assert 0 < drawn - 6 < 2 * whole


def test_what_is_left_at_the_end_fails(lm):
    """Texts that wait and texts that are being written are told, and nothing is taken any more."""

    async def scenario(batcher: Batcher) -> None:
        ticket = Ticket([dataclasses.replace(ONE, known=(97, *[FREE] * 60))] * 9)
        batcher.submit(ticket)
        batcher.start()
        await ticket.changed.wait()
        batcher.close()
        await _end(ticket)
        failures = [text.failure for text in ticket.texts]
        assert isinstance(failures[-1], Closed) and all(each is None or isinstance(each, Closed) for each in failures)
        with pytest.raises(Closed):
            batcher.submit(Ticket([ONE]))

    _run(lm, scenario, max_batch=2)


def test_an_error_of_one_batch_is_told_and_the_next_is_written(lm):
    """Here an id that the model does not have, which the checks of a request would have refused."""

    async def scenario(batcher: Batcher) -> None:
        wrong, right = Ticket([dataclasses.replace(ONE, known=(999, FREE))]), Ticket([ONE])
        batcher.submit(wrong)
        batcher.start()
        await _end(wrong)
        batcher.submit(right)
        await _end(right)
        assert "999" in str(wrong.texts[0].failure) and right.texts[0].failure is None

    _run(lm, scenario)
