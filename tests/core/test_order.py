"""Generation orders: what they are, how they are drawn, and what they refuse."""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from armd_jax.core import order
from armd_jax.core.block_mask import build
from armd_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

EVIDENCE = np.asarray([False, True, True, False, False, True, False, False])


def _key(seed: int) -> jax.Array:
    return jax.random.key(seed)


ALL_KINDS = {
    "left_to_right": lambda evidence: order.left_to_right(3, 8, evidence),
    "uniform": lambda evidence: order.uniform(_key(0), 3, 8, evidence),
    "scatter": lambda evidence: order.progressive(_key(1), 3, 8, 4, "scatter", evidence),
    "window": lambda evidence: order.progressive(_key(2), 3, 8, 4, "window", evidence),
    "reinsert": lambda evidence: order.progressive(_key(3), 3, 8, 4, "reinsert", evidence),
    "strided-1": lambda evidence: order.strided(3, 8, 1, evidence),
    "strided-4": lambda evidence: order.strided(3, 8, 4, evidence),
    "masked_diffusion": lambda evidence: order.masked_diffusion(_key(4), 3, 8, 3, "cosine", "elbo", evidence),
    "contiguous": lambda evidence: order.contiguous(_key(5), 3, 8, 3, evidence),
}


def _assert_is_an_order(drawn: order.Order) -> None:
    positions, blocks = np.asarray(drawn.positions_BN), np.asarray(drawn.block_BN)
    batch, length = drawn.shape
    assert drawn.positions_BN.dtype == drawn.block_BN.dtype == jnp.int32 and drawn.weight_BN.dtype == jnp.float32
    assert positions.shape == blocks.shape == drawn.weight_BN.shape
    np.testing.assert_array_equal(np.sort(positions, axis=1), np.tile(np.arange(length), (batch, 1)))
    assert np.all(blocks[:, 0] == 1) and np.all(np.isin(np.diff(blocks, axis=1), (0, 1)))


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("evidence", [None, EVIDENCE], ids=["free", "evidence"])
def test_every_constructor_gives_an_order(kind, evidence):
    """Positions are a permutation, block ids rise from 1 without gaps, and weights are 1, evidence or not."""
    drawn = ALL_KINDS[kind](evidence)
    _assert_is_an_order(drawn)
    assert drawn.shape == (3, 8) and np.all(np.asarray(drawn.weight_BN) == 1)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_evidence_comes_first(kind):
    """Known positions come first, in natural order, one token a block; the free ones follow in blocks of their own."""
    drawn = ALL_KINDS[kind](EVIDENCE)
    assert np.asarray(drawn.positions_BN)[:, :3].tolist() == [[1, 2, 5]] * 3
    assert np.asarray(drawn.block_BN)[:, :4].tolist() == [[1, 2, 3, 4]] * 3
    if not kind.startswith("strided"):  # where streams are cut from the free positions alone
        free = ALL_KINDS[kind](None)
        for row in range(3):
            keep = ~EVIDENCE[np.asarray(free.positions_BN)[row]]
            np.testing.assert_array_equal(drawn.positions_BN[row, 3:], np.asarray(free.positions_BN)[row, keep])
            together = np.diff(np.asarray(free.block_BN)[row, keep]) == 0
            np.testing.assert_array_equal(np.diff(np.asarray(drawn.block_BN)[row, 3:]) == 0, together)


def test_evidence_everywhere_or_nowhere():
    """All known is natural order one by one; none known is the order itself."""
    for kind, make in ALL_KINDS.items():
        known = make(np.ones(8, bool))
        assert known.positions_BN[0].tolist() == list(range(8)) and known.block_BN[0].tolist() == list(range(1, 9))
        free, none = make(None), make(np.zeros(8, bool))
        np.testing.assert_array_equal(free.positions_BN, none.positions_BN, err_msg=kind)
        np.testing.assert_array_equal(free.block_BN, none.block_BN, err_msg=kind)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2])
def test_shortest_rows(length):
    """Rows of one or two tokens are orders like any other, and have block masks."""
    for drawn in (
        order.left_to_right(2, length),
        order.uniform(_key(0), 2, length),
        order.progressive(_key(0), 2, length, 1),
        order.progressive(_key(0), 2, length, 1, "reinsert"),
        order.strided(2, length, 1),
        order.strided(2, length, length),
        order.masked_diffusion(_key(0), 2, length, 1),
        order.contiguous(_key(0), 2, length, 4),
        order.padding_last(order.left_to_right(2, length), jnp.ones((2, length), bool)),
    ):
        _assert_is_an_order(drawn)
        assert build(drawn).strict_len_BN.shape == build(drawn).x_len_BN.shape == (2, length)


def test_from_blocks():
    """Blocks in the given order, each with the given positions, the same in every row."""
    drawn = order.from_blocks([[2, 0], [1, 3], [4]], batch=2)
    _assert_is_an_order(drawn)
    assert drawn.positions_BN.tolist() == [[2, 0, 1, 3, 4]] * 2 and drawn.block_BN.tolist() == [[1, 1, 2, 2, 3]] * 2


# --- strided --------------------------------------------------------------------------------------------------------


def _strided(length: int, streams: int, evidence: list[int]) -> list[list[int]]:
    """Blocks of the strided order, from its definition: cut, heads one by one, then side by side."""
    free = [j for j in range(length) if j not in evidence]
    sizes = [len(free) // streams + (s < len(free) % streams) for s in range(streams)]
    ends = list(itertools.accumulate(sizes))
    cut = [free[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    groups = [[stream[d] for stream in cut if d < len(stream)] for d in range(1, max(sizes, default=0))]
    return [[j] for j in evidence] + [[stream[0]] for stream in cut if stream] + groups


def test_strided_example():
    """N = 8, S = 2 generates 1 5 2 6 3 7 4 8 (counted from 1), heads alone and then pairs."""
    drawn = order.strided(2, 8, 2)
    assert (np.asarray(drawn.positions_BN) + 1).tolist() == [[1, 5, 2, 6, 3, 7, 4, 8]] * 2
    assert drawn.block_BN.tolist() == [[1, 2, 3, 3, 4, 4, 5, 5]] * 2


@pytest.mark.parametrize(
    ("length", "evidence"),
    [(8, []), (12, []), (8, [0]), (8, [0, 1, 2]), (8, [1, 2, 5]), (9, [3, 8]), (8, [0, 1, 2, 3, 4, 5, 7]), (5, [4])],
)
def test_strided_is_its_definition(length, evidence):
    """Contiguous streams of the free positions, longer first, lengths within one; S + ceil(R/S) - 1 free blocks."""
    free = length - len(evidence)
    mask = np.isin(np.arange(length), evidence)
    traced = jax.jit(lambda streams: order.strided(1, length, streams, mask if evidence else None))
    for streams in range(1, free + 1):
        if not evidence and length % streams:
            continue
        drawn = order.strided(1, length, streams, mask if evidence else None)
        _assert_is_an_order(drawn)
        expected = order.from_blocks(_strided(length, streams, evidence))
        assert int(drawn.block_BN[0, -1]) == len(evidence) + streams + math.ceil(free / streams) - 1
        for found in (drawn, traced(streams)):
            np.testing.assert_array_equal(found.positions_BN, expected.positions_BN)
            np.testing.assert_array_equal(found.block_BN, expected.block_BN)


def test_one_stream_is_left_to_right():
    """S = 1 is the natural order, and so is S = N (heads alone)."""
    for streams in (1, 6):
        for a, b in zip(
            jax.tree.leaves(order.strided(2, 6, streams)), jax.tree.leaves(order.left_to_right(2, 6)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


# --- progressive ----------------------------------------------------------------------------------------------------


def _draw(seed: int, batch: int, length: int, k: int, permute: str) -> np.ndarray:
    return np.asarray(order.progressive(_key(seed), batch, length, k, permute).positions_BN)


def _longest_rise(values: np.ndarray) -> int:
    best = [1] * len(values)
    for i, j in itertools.product(range(len(values)), repeat=2):
        if j < i and values[j] < values[i]:
            best[i] = max(best[i], best[j] + 1)
    return max(best)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(9))
def test_progressive_moves_at_most_k_tokens(k):
    """scatter and window displace at most k, the window within k neighbours; reinsert keeps the others' order."""
    natural = np.arange(8)
    scattered, windowed = _draw(0, 200, 8, k, "scatter"), _draw(1, 200, 8, k, "window")
    displaced = (scattered != natural).sum(axis=1)
    assert displaced.max() <= k and (k < 2 or displaced.max() == k)
    for row in windowed:
        moved = np.flatnonzero(row != natural)
        assert not len(moved) or moved[-1] - moved[0] < k
    assert k < 2 or np.any(windowed != natural)
    for row in _draw(2, 60, 8, k, "reinsert"):
        assert _longest_rise(row) >= 8 - k
    if k == 0:
        assert all(np.all(_draw(3, 50, 8, 0, permute) == natural) for permute in ("scatter", "window", "reinsert"))
    if k == 1:
        assert np.all(scattered == natural) and np.all(windowed == natural)


def _assert_frequencies(rows: np.ndarray, expected: dict[tuple[int, ...], float]) -> None:
    """Every outcome is as frequent as expected within five standard deviations, and no other one occurs."""
    counts = collections.Counter(tuple(int(p) for p in row) for row in rows)
    assert set(counts) <= set(expected) and sum(expected.values()) == pytest.approx(1.0)
    for outcome, probability in expected.items():
        sigma = math.sqrt(probability * (1 - probability) / len(rows))
        assert abs(counts[outcome] / len(rows) - probability) < 5 * sigma, outcome


@pytest.mark.slow
def test_distributions_of_permutations():
    """Scatter of all tokens and `uniform` are uniform; fewer tokens have the frequencies of their definition."""
    identity = (0, 1, 2, 3)

    def swapped(i: int, j: int) -> tuple[int, ...]:
        row = list(identity)
        row[i], row[j] = row[j], row[i]
        return tuple(row)

    every = {p: 1 / 24 for p in itertools.permutations(range(4))}
    draws = 20_000
    _assert_frequencies(_draw(0, draws, 4, 4, "scatter"), every)
    _assert_frequencies(_draw(1, draws, 4, 4, "window"), every)
    _assert_frequencies(_draw(2, draws, 4, 4, "reinsert"), every)
    _assert_frequencies(np.asarray(order.uniform(_key(3), draws, 4).positions_BN), every)
    pairs = {swapped(i, j): 1 / 12 for i, j in itertools.combinations(range(4), 2)}
    _assert_frequencies(_draw(4, draws, 4, 2, "scatter"), {identity: 1 / 2} | pairs)
    neighbours = {swapped(i, i + 1): 1 / 6 for i in range(3)}
    _assert_frequencies(_draw(5, draws, 4, 2, "window"), {identity: 1 / 2} | neighbours)
    moves: dict[tuple[int, ...], float] = collections.defaultdict(float)
    for token, place in itertools.product(range(4), repeat=2):
        rest = [p for p in identity if p != token]
        moves[(*rest[:place], token, *rest[place:])] += 1 / 16
    _assert_frequencies(_draw(6, draws, 4, 1, "reinsert"), moves)


@pytest.mark.slow
def test_traced_k_equals_static_k():
    """The number of shuffled tokens may be traced: the curriculum's k depends on the step."""
    for permute in ("scatter", "window", "reinsert"):
        traced = jax.jit(lambda k, permute=permute: order.progressive(_key(0), 5, 8, k, permute).positions_BN)
        for k in (0, 1, 3, 8):
            np.testing.assert_array_equal(traced(k), _draw(0, 5, 8, k, permute))


@pytest.mark.slow
def test_rows_are_drawn_independently():
    """Rows of one batch differ."""
    for drawn in (order.uniform(_key(0), 8, 16), order.progressive(_key(0), 8, 16, 8)):
        assert len({tuple(row) for row in np.asarray(drawn.positions_BN)}) == 8
    assert len({tuple(row) for row in np.asarray(order.masked_diffusion(_key(0), 8, 16, 8).positions_BN)}) == 8


# --- contiguous -----------------------------------------------------------------------------------------------------


def _sizes(row: np.ndarray) -> list[int]:
    return np.bincount(row)[1:].tolist()


@pytest.mark.parametrize(("length", "max_block"), [(64, 4), (64, 1), (7, 3), (5, 9)])
def test_contiguous_is_the_natural_order_in_small_blocks(length, max_block):
    """Positions are natural, and blocks are as large as asked for at most, of every size, and others in every row."""
    drawn = jax.jit(lambda key: order.contiguous(key, 400, length, max_block))(_key(0))
    _assert_is_an_order(drawn)
    np.testing.assert_array_equal(drawn.positions_BN, np.tile(np.arange(length), (400, 1)))
    rows = np.asarray(drawn.block_BN)
    sizes = [_sizes(row) for row in rows]
    assert {size for row in sizes for size in row} == set(range(1, min(max_block, length) + 1))
    assert len({row.tobytes() for row in rows}) >= (1 if max_block == 1 else 13 if length < 64 else 400)
    other = order.contiguous(_key(1), 400, length, max_block)
    assert max_block == 1 or np.any(np.asarray(other.block_BN) != rows)


def test_sizes_of_contiguous_blocks_are_uniform():
    """The first block of a row, the second and the tenth have each size equally often, within five sigma.

    Sizes do not depend on one another, and the end of the row cuts the last block.
    """
    rows, max_block = 8000, 4
    sizes = [_sizes(row) for row in np.asarray(order.contiguous(_key(2), rows, 64, max_block).block_BN)]
    for number in (0, 1, 9):
        counts = np.bincount([row[number] for row in sizes], minlength=max_block + 1)[1:]
        assert np.all(np.abs(counts / rows - 1 / 4) < 5 * math.sqrt(3 / 16 / rows)), number
    pairs = collections.Counter((row[0], row[1]) for row in sizes)
    assert len(pairs) == 16
    assert all(abs(count / rows - 1 / 16) < 5 * math.sqrt(15 / 256 / rows) for count in pairs.values())
    cut = _sizes(np.asarray(order.contiguous(_key(3), 1, 5, 2**20).block_BN)[0])
    assert cut == [5]


# --- evidence, padding, errors --------------------------------------------------------------------------------------


def test_padding_last():
    """Padding goes behind everything, alone and with weight 0; valid positions keep their order, blocks and weights."""
    drawn = order.from_blocks([[2], [0, 3], [4, 1], [5]], batch=2)
    drawn = drawn.replace(weight_BN=jnp.asarray([[1.0, 2, 3, 4, 5, 6]] * 2))
    valid = jnp.asarray([[True, True, True, False, True, False], [True] * 6])
    moved = order.padding_last(drawn, valid)
    _assert_is_an_order(moved)
    assert moved.positions_BN.tolist() == [[2, 0, 4, 1, 3, 5], [2, 0, 3, 4, 1, 5]]
    assert moved.block_BN.tolist() == [[1, 2, 3, 3, 4, 5], [1, 2, 2, 3, 3, 4]]
    assert moved.weight_BN.tolist() == [[1, 2, 4, 5, 0, 0], [1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: order.progressive(_key(0), 1, 4, 2, "scater"),
            "permute='scater' is not known; did you mean 'scatter'",
        ),
        (lambda: order.strided(1, 8, 3), "length=8 is not divisible by streams=3"),
        (lambda: order.strided(1, 8, 16), "length=8 is not divisible by streams=16"),
        (lambda: order.strided(1, 8, 0), "streams=0: must be at least 1"),
        (lambda: order.strided(1, 8, -2), "streams=-2: must be at least 1"),
        (lambda: order.strided(1, 8, 6, EVIDENCE), "streams=6 exceeds the 5 positions left"),
        (lambda: order.strided(1, 6, 2, EVIDENCE), r"evidence: expected a bool array of shape \(6,\)"),
        (lambda: order.left_to_right(1, 8, EVIDENCE.astype(int)), "evidence: expected a bool array"),
        (lambda: order.uniform(_key(0), 1, 8, EVIDENCE[None]), "evidence: expected a bool array"),
        (lambda: order.contiguous(_key(0), 1, 4, 0), "max_block=0: must be at least 1"),
        (lambda: order.masked_diffusion(_key(0), 1, 4, 3, "linea"), "noise_schedule='linea' .* did you mean 'linear'"),
        (lambda: order.masked_diffusion(_key(0), 1, 4, 3, weight="elb"), "weight='elb' .* did you mean 'elbo'"),
        (lambda: order.from_times(jnp.ones((1, 4), jnp.int32), 3, weight="x"), "weight='x' is not known"),
        (lambda: order.alphas(3, "square"), "noise_schedule='square'"),
        (lambda: order.from_blocks([0, 1]), "expected lists of positions"),
        (lambda: order.from_blocks([[0.5, 1]]), "expected lists of positions"),
        (lambda: order.from_blocks([]), "at least one position"),
        (lambda: order.from_blocks([[0], [], [1]]), "every block needs at least one position"),
        (lambda: order.from_blocks([[0, 1], [1]]), r"positions 0 \.\. 2 once"),
        (lambda: order.from_blocks([[0, 3], [1]]), r"positions 0 \.\. 2 once"),
        (lambda: order.from_blocks([[-1, 0]]), r"positions 0 \.\. 1 once"),
    ],
)
def test_errors(make, message):
    """What cannot be an order is a UserError of one line that says why."""
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
