"""What generating texts returns, and where each of them ends."""

import dataclasses

import flax.struct
import numpy as np

from armd_jax.core.order import Order
from armd_jax.data.tokenizers import Tokenizer
from armd_jax.inference.schedule import ABSENT, FREE, lengths

NO_END = -1  # in place of an end-of-text token, if there is none


@dataclasses.dataclass(frozen=True)
class Ends:
    """What ends a text: the end-of-text token (or NO_END), and strings, which need a tokenizer."""

    token: int = NO_END
    stop: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None


@flax.struct.dataclass
class Generation:
    """What `LanguageModel.generate` returns. Arrays are at natural positions.

    tokens_BN: int32.
    log_prob_BN: float32, the model's log-probability of each token given all earlier blocks, at evidence positions too,
        and 0 where there is no token (`call_BN` is -1). It is the model's own, before temperature and truncation, and
        equal to `lm.log_prob(tokens_BN, order)` up to rounding, because a cache adds up the same numbers in another
        order: measured differences are up to 3e-6 nats in float32 and up to 0.022 nats if activations are bfloat16 (the
        default on accelerators). None for a denoiser, which gives no probability to a text.
    order: the order that was used; None for a denoiser, whose calls `call_BN` tells.
    num_calls: the number of function evaluations (NFE), that is of network calls that drew tokens. Evidence is read
        before them, in calls of many tokens, which are not counted.
    call_BN: int32, the number (from 1) of the call that made each token; 0 at evidence, -1 where no token was asked for
        or made: behind the end of a shorter row, and behind the end of a text that was written left to right.
    end_B: int32, where each text ends. It is the position of the first end-of-text that was generated, or the position
        behind the token that completes a stop string, and the row's length if there is neither. Tokens from there on
        are no part of the text.
    streams: S. drafted, accepted: of lossless decoding, how many tokens were drafted and checked, and how many of them
        were kept; 0 in other modes.
    stop: the strings that end a text. `texts` leaves them out.
    """

    tokens_BN: np.ndarray
    log_prob_BN: np.ndarray | None
    order: Order | None
    num_calls: int
    call_BN: np.ndarray
    end_B: np.ndarray
    streams: int = 1
    drafted: int = 0
    accepted: int = 0
    stop: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())


def collect(
    known_BN: np.ndarray,
    tokens_BN: np.ndarray,
    log_prob_BN: np.ndarray | None,
    order: Order | None,
    call_BN: np.ndarray,
    num_calls: int,
    ends: Ends,
    in_order: bool,
    streams: int = 1,
) -> Generation:
    """A generation with its ends, and with what its fields say at places where nothing was made.

    known_BN: as `requests.known_rows` gives it. call_BN: as in `Generation`, and anything behind a row. in_order:
    whether texts are written left to right, so that what lies behind an end counts as not made.
    """
    ends_BN = (known_BN == FREE) & (call_BN > 0) & (tokens_BN == ends.token)
    end_B = np.where(ends_BN.any(axis=1), ends_BN.argmax(axis=1), lengths(known_BN))
    kept_B = end_B + 1  # the end-of-text token itself was made
    for row in range(len(known_BN) if ends.stop else 0):
        if (stop := _stop(tokens_BN[row, : end_B[row]], call_BN[row, : end_B[row]], ends)) is not None:
            end_B[row] = kept_B[row] = stop
    none_BN = (call_BN < 0) | (known_BN == ABSENT)
    if in_order:
        none_BN = none_BN | (known_BN == FREE) & (np.arange(known_BN.shape[1]) >= kept_B[:, None])
    return Generation(
        tokens_BN=np.where(none_BN, max(ends.token, 0), tokens_BN).astype(np.int32),
        log_prob_BN=None if log_prob_BN is None else np.where(none_BN, np.float32(0), log_prob_BN),
        order=order,
        num_calls=num_calls,
        call_BN=np.where(none_BN, -1, call_BN).astype(np.int32),
        end_B=end_B.astype(np.int32),
        streams=streams,
        stop=ends.stop,
    )


def _stop(tokens_N: np.ndarray, call_N: np.ndarray, ends: Ends) -> int | None:
    """The place behind the token that completes the first stop string of a row, None if there is none.

    It is looked for in each stretch of generated tokens, up to the first place where a token is still missing.
    """
    assert ends.tokenizer is not None
    missing = np.flatnonzero(call_N < 0)
    for start, stop in stretches(call_N[: missing[0] if len(missing) else None]):
        tokens = tokens_N[start:stop].tolist()
        # The string is complete after `high` tokens, and not yet after `low`.
        low, high = 0, len(tokens)
        if cut(ends.tokenizer.decode(tokens), ends.stop) is None:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            found = cut(ends.tokenizer.decode(tokens[:middle]), ends.stop) is not None
            low, high = (low, middle) if found else (middle, high)
        return start + high
    return None


def stretches(call_N: np.ndarray) -> list[tuple[int, int]]:
    """Where each stretch of generated tokens begins and ends in a row of `Generation.call_BN`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], call_N > 0, [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def cut(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first of some strings begins in a text, None if there is none of them."""
    return min((at for each in stop if (at := text.find(each)) >= 0), default=None)


def texts(made: Generation, tokenizer: Tokenizer) -> list[str]:
    """The text of every row up to its end, what was given included, without a stop string that ended it."""
    found = []
    for row, end in enumerate(made.end_B.tolist()):
        tokens = made.tokens_BN[row, :end].tolist()
        text = tokenizer.decode(tokens)
        last = stretches(made.call_BN[row, :end])[-1:] if made.stop else []
        for start, stop in last:  # only the last stretch can hold a stop string, because a text ends there
            written = tokenizer.decode(tokens[start:])
            if stop == end and (at := cut(written, made.stop)) is not None:
                # Counted from the end, because a tokenizer may write the first tokens of a text in another way.
                text = text[: len(text) - (len(written) - at)]
        found.append(text)
    return found
