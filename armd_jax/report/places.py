"""The picture of nats by place in the stream: how cold streams start, and how they warm up."""

from collections.abc import Mapping

from armd_jax.evaluation.results import StreamPrice
from armd_jax.report.style import call_color, new_figure, png, styled


@styled
def picture(prices: Mapping[str, StreamPrice]) -> bytes:
    """One line for each number of streams, over the place in the stream on a logarithmic scale."""
    figure = new_figure(8, 3.8)
    axes = figure.subplots()
    for number, (streams, price) in enumerate(prices.items(), start=1):
        points = [
            ((place.first * place.last) ** 0.5, place.nats_per_token)
            for place in price.places
            if place.nats_per_token is not None and 0 < place.first <= place.last
        ]
        centres, nats = [centre for centre, _ in points], [value for _, value in points]
        color = call_color(number, len(prices) + 1)  # the lightest is too light for a line
        axes.plot(centres, nats, "o-", color=color, linewidth=1.8, markersize=4, label=f"S = {streams}")
    longest = max((place.last for price in prices.values() for place in price.places), default=1)
    ticks = [2**power for power in range(longest.bit_length())]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="place in the stream (1: its head)", ylabel="nats per token")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    return png(figure)
