"""What it costs to write in S streams side by side, taken apart, from the nats of every token of held-out text.

A strided order costs more than the order left to right for two reasons:

- Its blocks are factorised: S tokens are predicted together and do not see each other. The *independence gap* is the
  negative log-likelihood of the order with its blocks, minus that of the same sequence one token at a time.
- Its streams start cold: the first tokens of a stream do not know what stands right before them. The *cost of the
  order* is the negative log-likelihood of that sequence, one token at a time, minus that from left to right.

The two add up to the whole difference. Nats by place in the stream show where the second comes from.
"""

import numpy as np

from armd_jax.evaluation.results import Place, StreamPrice

SINGLE_PLACES = 8  # places of a stream that are reported one by one; those behind them, by octaves


class ByPlace:
    """Sums of nats by place in the stream, over batches."""

    def __init__(self, length: int) -> None:
        """length: N, the tokens of a row."""
        self.nats = np.zeros(length)  # by place, from 0
        self.tokens = np.zeros(length, np.int64)

    def add(self, depth_BN: np.ndarray, nats_BN: np.ndarray, valid_BN: np.ndarray) -> None:
        """Adds the valid tokens of a batch. depth_BN: int, see `core.documents.depths`."""
        depths, length = depth_BN[valid_BN], len(self.nats)
        self.nats += np.bincount(depths, weights=nats_BN[valid_BN].astype(np.float64), minlength=length)
        self.tokens += np.bincount(depths, minlength=length)

    def places(self) -> tuple[Place, ...]:
        """The first `SINGLE_PLACES` places one by one and the others by octaves (9-16, 17-32, …), as far as they go."""
        length = int(np.flatnonzero(self.tokens)[-1]) + 1
        octaves = (SINGLE_PLACES * 2**i for i in range(length.bit_length()))
        starts = [start for start in (*range(SINGLE_PLACES), *octaves) if start < length]
        found = []
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            tokens, nats = int(self.tokens[start:end].sum()), float(self.nats[start:end].sum())
            found.append(Place(first=start + 1, last=end, tokens=tokens, nats_per_token=nats / tokens))
        return tuple(found)

    def cold_start(self) -> tuple[float | None, float | None]:
        """Nats per token late in the stream, and the nats of a stream beyond that: its cold start.

        Late are the places furthest from the head that together hold at most half of all tokens. Both are None if there
        are none, as in streams of one token.
        """
        cumulated = np.cumsum(self.tokens)
        early = int(np.searchsorted(2 * cumulated, cumulated[-1])) + 1  # places that hold the earlier half
        late_tokens = int(self.tokens[early:].sum())
        if not late_tokens:
            return None, None
        late = float(self.nats[early:].sum()) / late_tokens
        excess = self.nats[:early].sum() - late * self.tokens[:early].sum()
        return late, float(excess / self.tokens[0])


def measure(
    with_blocks_R: np.ndarray,
    one_by_one_R: np.ndarray,
    left_to_right_R: np.ndarray,
    by_place: ByPlace,
    heads: int,
) -> StreamPrice:
    """The price of strided writing in some number of streams, in nats per token.

    with_blocks_R, one_by_one_R: nats of every row under the strided order, float64. left_to_right_R: of the same rows.
    by_place: of the order with blocks. heads: how many heads of streams there are with S = 1.
    """
    tokens = int(by_place.tokens.sum())
    gap_R, order_R = with_blocks_R - one_by_one_R, one_by_one_R - left_to_right_R
    late, cold_start = by_place.cold_start()
    more = int(by_place.tokens[0]) - heads
    return StreamPrice(
        nats_per_token=float(with_blocks_R.sum()) / tokens,
        independence_gap=float(gap_R.sum()) / tokens,
        independence_gap_error=_error_over_rows(gap_R, tokens),
        order_cost=float(order_R.sum()) / tokens,
        order_cost_error=_error_over_rows(order_R, tokens),
        order_cost_per_stream=float(order_R.sum()) / more if more > 0 else None,
        late_nats_per_token=late,
        cold_start=cold_start,
        places=by_place.places(),
    )


def _error_over_rows(nats_R: np.ndarray, tokens: int) -> float | None:
    """The standard error of a sum over rows, per token, if other rows of the same kind of text had been there."""
    return float(np.sqrt(len(nats_R) * np.var(nats_R, ddof=1))) / tokens if len(nats_R) > 1 else None
