"""Draws modes.png: what the texts of each decoding mode are worth, against the network calls that it takes.

    python experiments/pictures/modes.py runs/modes.json runs/confident.json

The files are those that `experiments/benchmarks/modes.py --results=FILE` writes. If two have the same mode and number
of streams, the earlier counts, and the judge is that of the first. The picture appears beside this script, or where
`--out` says.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, assert_never, get_args

from armd_jax.names import DecodingMode
from armd_jax.report import style

MODES: tuple[DecodingMode, ...] = get_args(DecodingMode)
ONE_PLACE = 0.12  # points whose calls per token differ by less, in powers of 2, share a label


def look(mode: DecodingMode) -> tuple[str, str, int]:
    """Colour and marker of a mode, and whether numbers of streams stand above its points (1) or below them (-1)."""
    match mode:
        case "strided":
            return style.BLUE, "o", 1
        case "lossless":
            return style.VERMILLION, "s", -1
        case "confident":
            return style.ORANGE, "D", 1
        case _:
            assert_never(mode)


def labels(rows: Sequence[dict[str, Any]], side: int) -> list[tuple[str, float, float]]:
    """Texts with the numbers of streams, and where they belong: behind the error bars, one for points in one place."""
    groups: list[list[dict[str, Any]]] = []
    for row in rows:
        if groups and abs(math.log2(row["calls_per_token"] / groups[-1][-1]["calls_per_token"])) < ONE_PLACE:
            groups[-1].append(row)
        else:
            groups.append([row])
    found = []
    for group in groups:
        ends = [row["generative_perplexity"] + side * row["generative_perplexity_error"] for row in group]
        text = "S = " + ", ".join(str(row["streams"]) for row in group)
        calls = [row["calls_per_token"] for row in group]
        found.append((text, math.sqrt(min(calls) * max(calls)), max(ends) if side > 0 else min(ends)))
    return found


@style.styled
def draw(result: dict[str, Any]) -> bytes:
    """The picture as the content of a PNG file."""
    figure = style.new_figure(8.0, 4.6)
    axes = figure.add_subplot()
    for mode in MODES:
        rows = sorted((row for row in result["modes"] if row["mode"] == mode), key=lambda row: row["streams"])
        if not rows:
            continue
        color, marker, side = look(mode)
        calls, worth = ([row[name] for row in rows] for name in ("calls_per_token", "generative_perplexity"))
        error = [row["generative_perplexity_error"] for row in rows]
        axes.errorbar(calls, worth, error, color=color, marker=marker, markersize=7, lw=1.8, capsize=3, label=mode)
        for text, x, y in labels(rows, side):
            place, align = (0, 5 * side), "bottom" if side > 0 else "top"
            axes.annotate(text, (x, y), place, textcoords="offset points", ha="center", va=align, color=color)
    own = result["judge"]["generative_perplexity"]
    axes.axhline(own, color=style.INK, lw=1.0, ls=(0, (4, 3)), label="texts of the judge itself")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.16)
    axes.grid(color=style.FAINT)
    axes.set_axisbelow(True)
    axes.set_xlabel("network calls per token")
    axes.set_ylabel("generative perplexity under an AR judge")
    axes.legend(frameon=False, loc="best")
    return style.png(figure)


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first of the results, with the cases that only later ones have."""
    cases = {(case["mode"], case["streams"]): case for each in reversed(results) for case in each["modes"]}
    return results[0] | {"modes": sorted(cases.values(), key=lambda case: (MODES.index(case["mode"]), case["streams"]))}


def main() -> int:
    """Writes the picture. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, nargs="+")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".png"))
    args = parser.parse_args()
    try:
        args.out.write_bytes(draw(joined([json.loads(file.read_text()) for file in args.results])))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, KeyError, TypeError) as error:
        files = ", ".join(map(str, args.results))
        print(f"error: {files}: not what experiments/benchmarks/modes.py writes: {error!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
