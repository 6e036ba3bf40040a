"""Parts of the report's HTML: the page itself, tables, cards, figures, and texts whose tokens have colours.

Every function takes plain text and returns HTML, unless it says otherwise.
"""

import base64
import html
from collections.abc import Collection, Sequence

from armd_jax.evaluation.results import Sample
from armd_jax.report.style import GIVEN, call_color, ink_on

_CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: #222; background: #fff;
       font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem; border-bottom: 2px solid #0072b2; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
.cards { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; }
.card { flex: 1 1 9.5rem; padding: .6rem .8rem; border: 1px solid #ccc; border-radius: .5rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.3; }
.card.main { border: 2px solid #0072b2; }
figure { margin: .8rem 0; overflow-x: auto; }
figure img { max-width: 100%; height: auto; }
figure img.wide { min-width: 44rem; }
figcaption, .note { color: #444; font-size: .92rem; }
.missing { padding: .6rem .8rem; background: #f4f4f4; border-left: 4px solid #d55e00; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; }
.text { padding: .5rem; border: 1px solid #ccc; border-radius: .4rem; white-space: pre-wrap; overflow-wrap: anywhere;
        font: .86rem/1.55 ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
.legend { display: flex; align-items: center; gap: .5rem; flex-wrap: wrap; font-size: .9rem; margin: .3rem 0; }
.legend i { display: inline-block; width: 9rem; height: .9rem; border-radius: .2rem; }
.legend i.given { width: .9rem; }
.replay { margin: 1rem 0; padding: .2rem .9rem; border: 1px solid #ccc; border-radius: .5rem; }
.replay h3 { margin-top: .6rem; }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem .9rem; margin: .6rem 0; }
.controls label { display: flex; align-items: center; gap: .4rem; max-width: 100%; }
.controls button, .controls select { font: inherit; min-height: 2.2rem; min-width: 0; padding: .1rem .7rem; }
#replay-play { min-width: 5.5rem; }
.controls .calls { flex: 1 1 14rem; }
.calls input { display: block; width: 100%; margin: 0; accent-color: #0072b2; }
.calls i { display: block; height: .5rem; margin: .2rem .5rem 0; border-radius: .2rem; }
.count { display: block; margin: .3rem 0; font-variant-numeric: tabular-nums; }
.replay :focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
.replayed { overflow: hidden; }
.replayed span { forced-color-adjust: none; border-radius: .1rem; }
.replayed .pending { color: transparent; background: #f1f1f1; box-shadow: inset -1px 0 #fff; user-select: none; }
.replayed .fresh { outline: 2px solid #d55e00; }
@media (prefers-reduced-motion: no-preference) { .replayed span { transition: background-color .15s; } }
@media print { .replay { display: none; } }
code, pre { font: .86rem/1.45 ui-monospace, Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { overflow-x: auto; }
"""


def page(title: str, heading: str, facts: Sequence[str], body: Sequence[str]) -> str:
    """The whole document. body: HTML."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{_CSS}</style></head><body>",
            f"<h1>{html.escape(heading)}</h1>",
            f'<p class="note">{"<br>".join(map(html.escape, facts))}</p>',
            *body,
            "</body></html>\n",
        ]
    )


def heading(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def subheading(text: str) -> str:
    """The heading of a part of a section."""
    return f"<h3>{html.escape(text)}</h3>"


def note(text: str) -> str:
    """A small paragraph."""
    return f'<p class="note">{html.escape(text)}</p>'


def missing(what: str, command: str) -> str:
    """A note in place of a section whose file is missing, with the command that writes the file."""
    return f'<p class="missing">{html.escape(what)}: run <code>{html.escape(command)}</code></p>'


def figure(png: bytes, caption: str, wide: bool = False) -> str:
    """A picture inside the page. wide: on small screens it is scrolled rather than made smaller."""
    data = base64.b64encode(png).decode("ascii")
    style = ' class="wide"' if wide else ""
    alt = html.escape(caption, quote=True)
    return (
        f'<figure><img{style} alt="{alt}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], strong: Collection[tuple[int, int]] = frozenset()
) -> str:
    """A table. Its first column holds names, the others numbers. strong: (row, column) of cells in bold, from 0."""

    def cell(row: int, column: int, text: str) -> str:
        content = html.escape(text)
        return f"<td><b>{content}</b></td>" if (row, column) in strong else f"<td>{content}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(cell(place, column, text) for column, text in enumerate(row)) + "</tr>"
        for place, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def cards(found: Sequence[tuple[str, str]]) -> str:
    """(number, what it is) in large letters; the first one is the main one."""
    shown = "".join(
        f'<div class="card{" main" if index == 0 else ""}"><b>{html.escape(number)}</b>{html.escape(label)}</div>'
        for index, (number, label) in enumerate(found)
    )
    return f'<div class="cards">{shown}</div>'


def details(summary: str, text: str) -> str:
    """A text as it is, hidden until somebody opens it."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"


def sample_text(sample: Sample) -> str:
    """The text of a sample, every token on the colour of its network call, or plain if its calls are not known."""
    if not has_calls(sample):
        return f'<div class="text">{html.escape(sample.text)}</div>'
    total = last_call(sample)
    spans = []
    for piece, call in zip(sample.pieces, sample.calls, strict=True):
        color = call_color(call, total)
        title = f"call {call} of {total}" if call else "given as prompt"
        style = f"background:{color};color:{ink_on(color)}"
        spans.append(f'<span style="{style}" title="{title}">{html.escape(piece)}</span>')
    given = f'<i class="given" style="background:{GIVEN}"></i> given' if 0 in sample.calls else ""
    legend = f'call 1 <i style="background:{gradient(total)}"></i> call {total} {given}'
    return f'<div class="legend">{legend}</div><div class="text">{"".join(spans)}</div>'


def gradient(num_calls: int) -> str:
    """The colours of all calls from the first to the last, as a background of CSS."""
    stops = ",".join(call_color(1 + round(i / 8 * (num_calls - 1)), num_calls) for i in range(9))
    return f"linear-gradient(to right,{stops})"


def last_call(sample: Sample) -> int:
    """The number of the last network call, of a sample whose calls are known."""
    return max(sample.num_calls, *sample.calls)


def has_calls(sample: Sample) -> bool:
    """Whether the network call of every token is known."""
    return 0 < len(sample.pieces) == len(sample.calls) and sample.num_calls > 0
