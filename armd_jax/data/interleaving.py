"""Which of several sources each row of training comes from: arithmetic alone, no files."""

import dataclasses
import heapq
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


@dataclasses.dataclass(frozen=True)
class _Fork:
    """Divides its places among two nodes. share: that of `left`, between 0 and 1."""

    share: Fraction
    left: "_Fork | int"
    right: "_Fork | int"


class Interleaving:
    """Gives each of the places 0, 1, 2, … to one of several sources, and numbers the places of every source.

    The two smallest shares are joined until one node is left (Huffman's tree). Of the first n places of a node whose
    left child has the share r of it, the left child gets the nearest whole number to n r (a half is rounded up) and the
    right child the others. So a place is found without walking through those before it, and every source gets its
    places in sequence, without a gap.

    Of the first n places, a source with the share s has n s, give or take less than two. For the rounding at a node
    adds at most 1/2 to the error of its parent times its share of the parent's places, and a node that is no leaf has
    at most 2/3 of these, because its sibling is no smaller than its larger child.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        """shares: those of the sources, each above 0, one in sum. Fractions, because rounded ones would drift."""
        if not shares or min(shares) <= 0 or sum(shares) != 1:
            raise ValueError(f"shares {shares} must be above 0 and add up to 1")
        heap: list[tuple[Fraction, int, _Fork | int]] = [(share, at, at) for at, share in enumerate(shares)]
        heapq.heapify(heap)
        for at in range(len(shares), 2 * len(shares) - 1):  # `at` settles ties, so that nodes are never compared
            (small, _, left), (large, _, right) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (small + large, at, _Fork(small / (small + large), left, right)))
        self._root = heap[0][2]

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, place among those of this source), int64 of the shape of `places`, which is one-dimensional."""
        if isinstance(self._root, int):
            return np.full_like(places, self._root), places
        found = [_locate(self._root, place) for place in places.tolist()]
        return np.array([source for source, _ in found], np.int64), np.array([place for _, place in found], np.int64)


def _locate(node: _Fork | int, place: int) -> tuple[int, int]:
    """Whole numbers of Python have no largest one: a place times a numerator may exceed 64 bits."""
    while isinstance(node, _Fork):
        part, whole = node.share.numerator, node.share.denominator
        before = (2 * place * part + whole) // (2 * whole)
        after = (2 * (place + 1) * part + whole) // (2 * whole)
        node, place = (node.left, before) if after > before else (node.right, place - before)
    return node, place
