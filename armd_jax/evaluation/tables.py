"""The results of `armd eval` as text for a terminal, and the tables of it that the report shows as well.

A table is a list of rows of texts, the header first.
"""

from collections.abc import Mapping, Sequence

from armd_jax.evaluation import order_bounds, results
from armd_jax.evaluation.results import Evaluation, OrderBounds, StreamPrice

PRICE_TITLE = "What streams cost, in nats per token (cold start and extra stream: in nats per stream):"
PLACES_TITLE = "Nats per token by place in the stream:"


def bounds_title(found: OrderBounds) -> str:
    """What the bounds are of."""
    which = "all orders" if found.shuffled is None else f"orders with {found.shuffled:,} tokens shuffled"
    rows = f"{found.rows:,} rows, {found.tokens:,} tokens"
    return f"Negative log-likelihood of the mixture over {which}, bounded by K of them ({rows}):"


def bounds_note(found: OrderBounds) -> str:
    """How far orders differ, and why there are no bounds from both sides if there are not."""
    if found.spread is None:
        return "One order bounds the figure on one side only."
    note = f"A row's nats differ by {found.spread:.2f} between these orders (standard deviation)."
    if all(bound.nll_at_least is None for bound in found.bounds.values()):
        if found.rows < order_bounds.MIN_ROWS:
            note += f" Fewer than {order_bounds.MIN_ROWS} rows do not say what the figure is at least."
        else:
            note += (
                " So few draws do not say what the figure is at least: orders differ too much, in some row or in all,"
                " or the figure would be below 0."
            )
    return note


def bounds_table(found: OrderBounds) -> list[list[str]]:
    """The bounds on the likelihood of the mixture over orders, the header first."""
    cells = [
        ["orders K", "nats per token at least", "nats per token at most", "perplexity at least", "perplexity at most"]
    ]
    for orders, bound in found.bounds.items():
        sides = (bound.nll_at_least, bound.nll_at_least_error), (bound.nll_at_most, bound.nll_at_most_error)
        perplexities = (results.formatted(None if side is None else results.perplexity(side), 2) for side, _ in sides)
        cells.append([orders, *(with_error(*side) for side in sides), *perplexities])
    return cells


def price_table(found: Mapping[str, StreamPrice]) -> list[list[str]]:
    """The price of streams taken apart, the header first."""
    cells = [
        [
            "streams",
            "nats per token",
            "independence gap",
            "cost of the order",
            "nats per extra stream",
            "late",
            "cold start",
        ]
    ]
    for streams, price in found.items():
        cells.append(
            [
                streams,
                results.formatted(price.nats_per_token, 4),
                with_error(price.independence_gap, price.independence_gap_error, 5),
                with_error(price.order_cost, price.order_cost_error, 5),
                results.formatted(price.order_cost_per_stream, 2),
                results.formatted(price.late_nats_per_token, 4),
                results.formatted(price.cold_start, 2),
            ]
        )
    return cells


def places_table(found: Mapping[str, StreamPrice]) -> list[list[str]]:
    """Nats per token by place in the stream, a column for each number of streams, the header first."""
    columns = [{(place.first, place.last): place.nats_per_token for place in price.places} for price in found.values()]
    spans = sorted({span for column in columns for span in column})
    cells = [["place in the stream", *(f"S = {streams}" for streams in found)]]
    for span in spans:
        name = str(span[0]) if span[0] == span[1] else f"{span[0]}–{span[1]}"
        cells.append([name, *(results.formatted(column.get(span), 4) for column in columns)])
    return cells


def with_error(value: float | None, error: float | None, digits: int = 4) -> str:
    """A figure and its standard error for people, as far as they are known."""
    return results.formatted(value, digits) + ("" if value is None or error is None else f" ± {error:.{digits}f}")


def as_text(result: Evaluation) -> str:
    """The figures as a table for a terminal."""
    rows = results.rows(result)
    width = max(30, *(len(row.name) for row in rows))
    sizes = f"{result.bytes:,} bytes, {result.tokens:,} tokens, {result.words:,} words"
    lines = [f"{result.split}: {sizes}{results.raw_weights(result.ema)}"]
    lines.append(f"{'':<{width}} {'bits/byte':>11} {'ppl/token':>13} {'ppl/word':>18}")
    for row in rows:
        per_token, per_word = (
            results.formatted(value, 3) for value in (row.score.perplexity_per_token, row.score.perplexity_per_word)
        )
        bits = results.formatted_bits(row.score, result.lossless, 4)
        lines.append(f"{row.name:<{width}} {bits:>11} {per_token:>13} {per_word:>18}")
    if (found := result.random_orders) and found.spread is not None:
        lines.append(f"A row's nats differ by {found.spread:.2f} between random orders (standard deviation).")
    if bounds := result.order_bounds:
        lines += ["", bounds_title(bounds), *_in_columns(bounds_table(bounds)), bounds_note(bounds)]
    if result.price:
        lines += ["", PRICE_TITLE, *_in_columns(price_table(result.price))]
        lines += ["", PLACES_TITLE, *_in_columns(places_table(result.price))]
    return "\n".join(lines)


def _in_columns(cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for a terminal, columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
