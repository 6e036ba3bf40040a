"""The pictures of a report, each a function from numbers to the bytes of a PNG.

One palette everywhere, readable with colour-blind eyes and in grey: Okabe and Ito's for categories, viridis wherever
colour means "when" (dark: generated early, light: late). Matplotlib is imported when the first picture is drawn.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from armd_jax.config import Config
from armd_jax.core import block_mask, order
from armd_jax.core import curriculum as curriculum_lib
from armd_jax.core.order import Order
from armd_jax.training import step as training_step

BLUE, ORANGE, GREEN, VERMILLION, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9"
INK, FAINT = "#222222", "#ececec"
GIVEN = "#d9d9d9"  # tokens of a prompt: no network call made them
_PHASE_COLORS = {"identity": "#ffffff", "rising": "#dbeaf5", "constant": "#fbeed2", "SBP": "#d8eee6"}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,
    "savefig.facecolor": "white",
}


def _figure(width: float, height: float) -> Any:
    """A figure outside pyplot: no global state, no window system, nothing to close."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(_STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _styled(draw: Callable[..., bytes]) -> Callable[..., bytes]:
    """Runs a picture under this file's style and puts the caller's matplotlib settings back afterwards."""

    def styled(*args: Any, **kwargs: Any) -> bytes:
        import matplotlib

        with matplotlib.rc_context():
            return draw(*args, **kwargs)

    styled.__doc__, styled.__name__ = draw.__doc__, draw.__name__
    return styled


def call_color(call: int, num_calls: int) -> str:
    """`#rrggbb` of network call `call` (1 .. num_calls; 0: given as prompt): viridis from dark to light.

    Up to 128 calls all have different colours; of more, neighbours may share one.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["viridis"]((call - 1) / max(num_calls - 1, 1))) if call > 0 else GIVEN


def ink_on(color: str) -> str:
    """Black or white, whichever has more contrast on `#rrggbb` (relative luminance, WCAG)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.18 else "#ffffff"


def phases(config: Config) -> list[tuple[str, int, int]]:
    """(name, first step, step after the last) of every phase of the order schedule that has steps."""
    return [(p.name, p.first, p.end) for p in curriculum_lib.phases(config.order, config.training.num_steps)]


def _shade_phases(axes: Any, config: Config, last: float, labels: bool = True) -> None:
    shown = [(name, start, min(stop, last)) for name, start, stop in phases(config) if start < last]
    for name, start, stop in shown:
        axes.axvspan(start, stop, color=_PHASE_COLORS.get(name, "#ffffff"), zorder=0, linewidth=0)
        if start:
            axes.axvline(start, color="#bbbbbb", linewidth=0.8, zorder=1)
        if labels and stop - start > 0.06 * last:
            text = name.replace("_", " ")
            axes.text((start + stop) / 2, 1.01, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a thirtieth of the curve, with narrower windows at the ends."""
    half = min(len(values) // 60 + 1, len(values) - 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), half)
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float) and "step" in row]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    return np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs], float)


@_styled
def loss(rows: Sequence[dict[str, Any]], config: Config) -> bytes:
    """Training and held-out loss over the steps, the learning rate below; the curriculum's phases shaded."""
    steps, nll = _series(rows, "train/nll")
    eval_steps, eval_nll = _series(rows, "eval/nll")
    rate_steps, rate = _series(rows, "train/learning_rate")
    last = max([1.0, *steps, *eval_steps])
    figure = _figure(8, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _shade_phases(top, config, last)
    _shade_phases(bottom, config, last, labels=False)
    if len(steps):
        top.plot(steps, nll, color=SKY, linewidth=0.8, alpha=0.7, label="training, every logged step")
        top.plot(steps, _smooth(nll), color=BLUE, linewidth=2, label="training, smoothed")
    if len(eval_steps):
        label = "held-out text, left to right"
        top.plot(eval_steps, eval_nll, "o-", color=VERMILLION, linewidth=1.5, markersize=5, label=label)
        top.annotate(
            f"{eval_nll[-1]:.3f}",
            (eval_steps[-1], eval_nll[-1]),
            xytext=(-4, 10),
            textcoords="offset points",
            ha="right",
            color=VERMILLION,
            fontweight="bold",
        )
    top.set(ylabel="loss (nats per token)", xlim=(0, last))
    top.legend(frameon=True, framealpha=0.85, edgecolor="none")
    top.grid(axis="y", color="#dddddd", linewidth=0.6)
    bottom.plot(rate_steps, rate, color=INK, linewidth=1.5)
    bottom.set(ylabel="learning\nrate", xlabel="training step", ylim=(0, None))
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return _png(figure)


def example_orders() -> list[tuple[str, Order]]:
    """A small order (N = 8) of every kind, the random ones with a fixed key, and what to call it."""
    evidence = np.zeros(8, bool)
    evidence[[2, 5]] = True
    return [
        ("left to right", order.left_to_right(1, 8)),
        ("progressive, 4 tokens shuffled", order.progressive(jax.random.key(3), 1, 8, 4)),
        ("uniform", order.uniform(jax.random.key(1), 1, 8)),
        ("strided, S = 2", order.strided(1, 8, 2)),
        ("masked diffusion, 4 time steps", order.masked_diffusion(jax.random.key(0), 1, 8, 4)),
        ("evidence 2 and 5 first, then strided, S = 2", order.strided(1, 8, 2, evidence=evidence)),
    ]


@_styled
def masks() -> bytes:
    """Both block masks of a small example of every order kind: rows are targets, columns what they may see."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colors = ListedColormap([FAINT, BLUE, ORANGE])
    examples = example_orders()
    figure = _figure(13, 11.2)
    outer = figure.subfigures(math.ceil(len(examples) / 2), 2, wspace=0.02, hspace=0.02)
    for (title, example), cell in zip(examples, np.ravel(outer), strict=True):
        cell.suptitle(title, fontweight="bold", fontsize=13)
        mask = block_mask.build(example)
        positions, blocks = np.asarray(example.positions_BN[0]), np.asarray(example.block_BN[0])
        keys = len(positions) + 1
        strict = np.asarray(block_mask.dense(mask.strict_len_BN, keys)[0])
        causal = np.asarray(block_mask.dense(mask.causal_len_BN, keys)[0])
        pairs = (("strictly causal (stream G)", strict), ("causal (all other attention)", causal))
        for axes, (name, seen) in zip(cell.subplots(1, 2), pairs, strict=True):
            axes.imshow(seen.astype(int) + (seen & ~strict), cmap=colors, vmin=0, vmax=2, aspect="equal")
            axes.set_anchor("N")
            axes.set_title(name, fontsize=11)
            axes.set_xticks(range(keys), ["start", *map(str, positions)], fontsize=9)
            axes.get_xticklabels()[0].set_rotation(90)
            labels = [f"{p}  (block {b})" for p, b in zip(positions, blocks, strict=True)]
            axes.set_yticks(range(len(positions)), labels if seen is strict else list(map(str, positions)), fontsize=9)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            lines = np.arange(keys)
            widths = np.where(np.diff(blocks, prepend=0, append=blocks[-1] + 1) > 0, 2.0, 0.4)
            axes.hlines(lines - 0.5, -0.5, keys - 0.5, colors="#ffffff", linewidths=widths)
            axes.vlines(lines + 0.5, -0.5, keys - 1.5, colors="#ffffff", linewidths=widths)
            axes.set_xlabel("token that is seen (position)", fontsize=10)
            if seen is strict:
                axes.set_ylabel("token to predict (position)", fontsize=10)
    names = ("seen: an earlier block", "seen: its own block (causal mask only)", "hidden")
    handles = [Patch(color=color, label=name) for color, name in zip((BLUE, ORANGE, FAINT), names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=12)
    return _png(figure)


def _example_orders(config: Config) -> list[tuple[str, int, np.ndarray, np.ndarray]]:
    """(phase, step, positions [N], blocks [N]) of up to six orders as training draws them, and worth seeing."""
    draw = jax.jit(lambda step: training_step.draw_order(config, step, config.model.max_length))
    fractions = {"identity": (0.5,), "rising": (0.33, 0.95), "constant": (0.5,)}
    examples = []
    for name, start, stop in phases(config):
        varied = name in ("SBP", "strided")  # S changes from step to step: look at several for two that differ
        found = {}
        for fraction in np.linspace(0.1, 0.9, 9) if varied else fractions.get(name, (0.1, 0.4, 0.7)):
            step = start + int(fraction * (stop - start))
            drawn = draw(step)
            positions, blocks = np.asarray(drawn.positions_BN[0]), np.asarray(drawn.block_BN[0])
            found.setdefault(int(blocks[-1]) if varied else step, (name, step, positions, blocks))
        kept = [found[key] for key in sorted(found)[: 2 if varied else None]]
        examples += sorted(kept, key=lambda example: example[1])
    return examples


@_styled
def curriculum(config: Config) -> bytes:
    """Shuffled tokens k over the steps, and below it orders that training draws at a few of them."""
    length, total = config.model.max_length, config.training.num_steps
    examples = _example_orders(config)
    rows = math.ceil(len(examples) / 3)
    height = 3.2 if config.order.kind == "progressive" else 1.5
    figure = _figure(9, height + 0.2 + 3.0 * rows)
    upper, lower = figure.subfigures(2, 1, height_ratios=[height, 3.0 * rows], hspace=0.04)
    axes = upper.subplots()
    _shade_phases(axes, config, total)
    steps = np.unique(np.concatenate([np.linspace(0, total - 1, 400).astype(int), [e[1] for e in examples]]))
    if config.order.kind == "progressive":
        base = steps[steps < phases_end(config)]
        axes.plot(
            base,
            np.asarray(curriculum_lib.num_permuted(config.order, jnp.asarray(base))),
            color=BLUE,
            linewidth=2.5,
            drawstyle="steps-post",
        )
        axes.set(ylabel="shuffled tokens k", ylim=(0, 1.25 * max(config.order.max_permuted, 1)))
    else:
        axes.set(yticks=[], ylim=(0, 1))
    for number, (_, step, _, _) in enumerate(examples):
        axes.axvline(step, color=VERMILLION, linewidth=1, linestyle=":")
        axes.text(
            step, 0.93, "ABCDEFGHI"[number], transform=axes.get_xaxis_transform(), ha="center", va="top",
            color="white", fontweight="bold", bbox={"boxstyle": "circle,pad=0.2", "fc": VERMILLION, "ec": "none"},
        )  # fmt: skip
    if any(name == "SBP" for name, _, _ in phases(config)) and config.order.kind != "strided":
        streams = ", ".join(map(str, config.order.streams))
        axes.text(
            (phases_end(config) + total) / 2, 0.06, f"S from {streams}", transform=axes.get_xaxis_transform(),
            ha="center", rotation=90 if config.order.sbp_steps < 0.12 * total else 0, color="#00664b",
            bbox={"fc": _PHASE_COLORS["SBP"], "ec": "none", "pad": 1},
        )  # fmt: skip
    axes.set(xlabel="training step", xlim=(0, total))
    panels = np.atleast_1d(lower.subplots(rows, min(3, len(examples)), sharex=True, sharey=True, squeeze=False)).ravel()
    for number, panel in enumerate(panels):
        if number >= len(examples):
            panel.set_axis_off()
            continue
        name, step, positions, blocks = examples[number]
        size = float(np.clip(6000 / length / 2, 3, 40))
        panel.scatter(np.arange(length), positions, c=blocks, cmap="viridis", s=size, linewidths=0)
        kind = name.replace("_", " ")
        if kind in ("SBP", "strided"):  # the stream heads are the blocks of one token
            kind += f", S = {int(np.sum(np.bincount(blocks) == 1)) if blocks[-1] < length else 1}"
        panel.set_title(f"{'ABCDEFGHI'[number]}: step {step}, {kind}", fontsize=11)
        if number % 3 == 0:
            panel.set_ylabel("position in the text")
        if number + 3 >= len(examples):
            panel.set_xlabel("n-th token generated")
            panel.tick_params(labelbottom=True)
    return _png(figure)


def phases_end(config: Config) -> int:
    """The step where the order schedule hands over to SBP fine-tuning (the number of steps without it)."""
    return config.training.num_steps - (0 if config.order.kind == "strided" else config.order.sbp_steps)


@_styled
def samples(drawn: Sequence[dict[str, Any]]) -> bytes:
    """The text of each sample, every token on the colour of the network call that made it, and a strip of all calls."""
    from matplotlib.colors import to_rgb

    columns, max_lines, cell = 92, 12, 0.205  # characters a line, lines a sample, inches a line
    laid_out = [_layout(sample["pieces"], sample["calls"], columns) for sample in drawn]
    heights = [cell * min(max(len(lines), 1), max_lines) + 0.85 for lines in laid_out]
    total = sum(heights) + 0.4
    figure = _figure(9, total)
    figure.set_layout_engine("none")
    note = "Dark: made by an early network call, light: by a late one. The strip is the whole text, the lines its top."
    figure.text(0.015, (total - 0.3) / total, note, fontsize=10)
    top = total - 0.4
    for sample, lines, height in zip(drawn, laid_out, heights, strict=True):
        shown, calls = lines[:max_lines], np.asarray(sample["calls"])
        num_calls = max(int(sample["num_calls"]), 1)
        title = f"S = {sample['streams']}: {len(calls)} tokens in {sample['num_calls']} network calls"
        figure.text(0.015, (top - 0.3) / total, title, fontweight="bold")
        strip = figure.add_axes((0.015, (top - 0.55) / total, 0.97, 0.16 / total))
        strip.imshow([[to_rgb(call_color(int(call), num_calls)) for call in calls]], aspect="auto")
        strip.set_axis_off()
        depth = cell * max(len(shown), 1)
        axes = figure.add_axes((0.015, (top - 0.62 - depth) / total, 0.97, depth / total))
        axes.set(xlim=(0, columns), ylim=(max(len(shown), 1), 0))
        axes.set_axis_off()
        for row, line in enumerate(shown):
            for column, (character, call) in enumerate(line):
                color = call_color(call, num_calls)
                axes.add_patch(_rectangle(column, row, color))
                axes.text(
                    column + 0.5, row + 0.52, character, color=ink_on(color), ha="center", va="center",
                    family="DejaVu Sans Mono", fontsize=10,
                )  # fmt: skip
        top -= height
    return _png(figure)


def _rectangle(column: int, row: int, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column, row + 0.04), 1, 0.92, facecolor=color, edgecolor=color, linewidth=0.3)


def _layout(pieces: Sequence[str], calls: Sequence[int], columns: int) -> list[list[tuple[str, int]]]:
    """(character, call) cells line by line: broken at line ends, which show as an arrow, and at the width."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties(family="DejaVu Sans Mono"))).get_charmap()
    lines: list[list[tuple[str, int]]] = [[]]
    for piece, call in zip(pieces, calls, strict=False):
        for character in piece.replace("\r\n", "\n").replace("\t", "    "):
            printable = "↵" if character == "\n" else character if ord(character) in known else "□"
            lines[-1].append((printable, call))
            if character == "\n" or len(lines[-1]) >= columns:
                lines.append([])
    return [line for line in lines if line]


@_styled
def speed(drawn: Sequence[dict[str, Any]]) -> bytes:
    """Tokens a second and network calls for each number of streams."""
    names = [f"S = {sample['streams']}" for sample in drawn]
    figure = _figure(8, 3.4)
    left, right = figure.subplots(1, 2)
    base = next((s["tokens_per_second"] for s in drawn if s["streams"] == 1), None)
    rates, calls = [s["tokens_per_second"] for s in drawn], [s["num_calls"] for s in drawn]
    speedups = [f"\n×{rate / base:.2f}" if base else "" for rate in rates]
    labels = [f"{rate:,.0f}{times}" for rate, times in zip(rates, speedups, strict=True)]
    left.bar_label(left.bar(names, rates, color=BLUE, width=0.65), labels=labels, padding=2)
    left.set(title="tokens per second", ylim=(0, 1.28 * max(rates)))
    right.bar_label(right.bar(names, calls, color=ORANGE, width=0.65), padding=2)
    right.set(title="network calls for one text", ylim=(0, 1.15 * max(calls)))
    return _png(figure)


@_styled
def bits(rows: Sequence[tuple[str, float]], xz: float | None, unit: str) -> bytes:
    """One bar for each order, and a dashed line where the compressor stands."""
    figure = _figure(8, 0.9 + 0.48 * len(rows))
    axes = figure.subplots()
    colors = [BLUE if name.startswith("left") else SKY for name, _ in rows]
    axes.barh([name for name, _ in rows], [value for _, value in rows], color=colors, height=0.65)
    top = max([value for _, value in rows] + ([xz] if xz else []))
    for row, ((_, value), color) in enumerate(zip(rows, colors, strict=True)):
        axes.text(0.015 * top, row, f"{value:.3f}", va="center", color=ink_on(color), fontweight="bold")
    if xz:
        axes.axvline(xz, color=VERMILLION, linestyle="--", linewidth=2)
        axes.text(xz, -0.62, f" xz: {xz:.3f}", color=VERMILLION, va="bottom", fontweight="bold")
    axes.set(xlabel=f"{unit} (shorter is better)", xlim=(0, 1.15 * top), ylim=(len(rows) - 0.5, -1.1))
    return _png(figure)
