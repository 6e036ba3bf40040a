"""`armd report --run=DIR`: one self-contained HTML page about a run, and its pictures as PNG files beside it.

The page reads what the other verbs left in the run's folder (config.json, metrics.jsonl, events.jsonl, eval.json,
samples.json). Only config.json has to be there: a section whose file is missing names the command that writes it.
"""

import base64
import html
import json
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from armd_jax.config import Config, from_config_dict
from armd_jax.errors import UserError
from armd_jax.evaluation import plots
from armd_jax.files import read_json_lines as read_rows
from armd_jax.files import write as write_atomically

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
code, pre { font: .86rem/1.45 ui-monospace, Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { overflow-x: auto; }
"""


def write(run: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` and its PNGs into the run's folder and returns the page's path.

    Everything is drawn before the first file is written, and every file is written whole or not at all.
    Raises UserError where `run` is no run, one of its files cannot be read, or the folder cannot be written.
    """
    run = pathlib.Path(run)
    config = _read_config(run)
    rows, events = _read_lines(run / "metrics.jsonl"), _read_lines(run / "events.jsonl")
    scores, drawn = _read_json(run / "eval.json"), _read_json(run / "samples.json")
    where = shlex.quote(str(run))
    pictures: dict[str, bytes] = {}

    try:
        sections = [
            _headline(scores, drawn, where),
            _quality(scores, pictures, where),
            _speed(drawn, pictures, where),
            _samples(drawn, pictures, where),
            _training(rows, config, pictures, where),
            _curriculum(config, pictures),
            _masks(pictures),
        ]
        page = _page(run, config, rows, events, sections)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{run}: metrics.jsonl, events.jsonl, eval.json or samples.json is not what a verb of armd wrote there"
            f" ({type(error).__name__}: {error}); write it again"
        ) from error
    try:
        for name, data in pictures.items():
            write_atomically(run / name, data)
        write_atomically(run / "report.html", page.encode("utf-8"))
    except OSError as error:
        raise UserError(f"{run}: the report cannot be written there: {error.strerror or error}") from error
    return run / "report.html"


def _read_config(run: pathlib.Path) -> Config:
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    values = _read_json(run / "config.json")
    if values is None:
        raise UserError(f"{run}: not a run: it holds no config.json")
    try:
        return from_config_dict(values)
    except UserError as error:
        raise UserError(f"{run / 'config.json'}: {error}") from error


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        return [row for row in read_rows(path) if isinstance(row, dict) and isinstance(row.get("step"), int)]
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _page(
    run: pathlib.Path, config: Config, rows: list[dict[str, Any]], events: list[dict[str, Any]], sections: list[str]
) -> str:
    name = html.escape(run.resolve().name)
    model, order = config.model, config.order
    done = max([row["step"] for row in rows + events], default=0)
    resumed = sum(event.get("event") == "resume" for event in events)
    source = config.data.path or "the embedded corpus"
    facts = [
        f"{done:,} of {config.training.num_steps:,} training steps"
        + (f", resumed {resumed} time{'s' if resumed > 1 else ''}" if resumed else ""),
        f"{model.num_layers} layers ({model.two_stream_layers} two-stream), width {model.width},"
        f" {model.num_heads} heads, rows of {model.max_length} tokens",
        f"{order.kind.replace('_', ' ')} orders, batches of {config.training.batch_size} rows",
        f"text: {source}, tokenizer: {config.data.tokenizer}",
    ]
    stored = html.escape(json.dumps(_read_json(run / "config.json"), indent=2))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}: training report</title><style>{_CSS}</style></head><body>",
            f"<h1>{name}: an auto-regressive masked diffusion model</h1>",
            f'<p class="note">{"<br>".join(map(html.escape, facts))}</p>',
            *sections,
            f"<h2>Configuration</h2><details><summary>every field</summary><pre>{stored}</pre></details>",
            "</body></html>\n",
        ]
    )


def _missing(what: str, command: str) -> str:
    return f'<p class="missing">{what}: run <code>{html.escape(command)}</code></p>'


def _figure(pictures: dict[str, bytes], name: str, caption: str, wide: bool = False) -> str:
    data = base64.b64encode(pictures[name]).decode("ascii")
    style = ' class="wide"' if wide else ""
    alt = html.escape(caption, quote=True)
    return (
        f'<figure><img{style} alt="{alt}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _number(value: float | None, digits: int, absent: str = "–") -> str:
    return absent if value is None else f"{value:,.{digits}f}"


def _bits(score: dict[str, Any]) -> str:
    """Bits per byte; a tokenizer that changes the text has none."""
    return _number(score.get("bits_per_byte"), 3, "n/a (lossy)")


def _order_rows(scores: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name of an order, its scores) for all that eval.json holds."""
    rows = []
    if scores.get("left_to_right"):
        rows.append(("left to right", scores["left_to_right"]))
    rows += [(f"strided, S = {streams}", score) for streams, score in (scores.get("strided") or {}).items()]
    if scores.get("random_orders"):
        draws = scores["random_orders"].get("draws")
        rows.append((f"random orders ({draws} drawn)" if draws else "random orders", scores["random_orders"]))
    if scores.get("elbo"):
        rows.append((f"ELBO, T = {scores['elbo'].get('diffusion_steps')}", scores["elbo"]))
    return rows


def _headline(scores: dict[str, Any] | None, drawn: dict[str, Any] | None, where: str) -> str:
    cards = []
    if scores:
        split = html.escape(str(scores.get("split", "held-out")))
        if scores.get("left_to_right"):
            cards.append((_bits(scores["left_to_right"]), f"bits per byte, left to right ({split} text, exact)"))
        if scores.get("xz_bits_per_byte") is not None:
            cards.append((_number(scores["xz_bits_per_byte"], 3), "bits per byte, xz -9e after the training text"))
        if scores.get("random_orders"):
            cards.append((_bits(scores["random_orders"]), "bits per byte, expected over random orders"))
        if scores.get("left_to_right"):
            perplexity = _number(scores["left_to_right"].get("perplexity_per_token"), 2)
            cards.append((perplexity, "perplexity per token, left to right"))
    by_streams = {sample["streams"]: sample for sample in _timed(drawn)}
    if 1 in by_streams and len(by_streams) > 1:
        most = max(by_streams)
        gain = by_streams[most]["tokens_per_second"] / by_streams[1]["tokens_per_second"]
        cards.append((f"×{gain:.2f}", f"tokens per second with {most} streams against 1"))
    if not cards:
        return _missing("No numbers yet", f"armd eval --run={where}")
    shown = "".join(
        f'<div class="card{" main" if number == 0 else ""}"><b>{value}</b>{label}</div>'
        for number, (value, label) in enumerate(cards)
    )
    return f'<div class="cards">{shown}</div>'


def _quality(scores: dict[str, Any] | None, pictures: dict[str, bytes], where: str) -> str:
    title = "<h2>How well it predicts held-out text</h2>"
    rows = _order_rows(scores or {})
    if not scores or not rows:
        return title + _missing("Not measured yet", f"armd eval --run={where}")
    lossy = any(score.get("bits_per_byte") is None for _, score in rows)
    unit, field = ("nats per token", "nats_per_token") if lossy else ("bits per byte", "bits_per_byte")
    xz = scores.get("xz_bits_per_byte")
    pictures["bits.png"] = plots.bits([(name, score[field]) for name, score in rows], None if lossy else xz, unit)
    if scores.get("unigram"):
        rows.append(("unigram model", scores["unigram"]))
    cells = [
        [name, _bits(score), *(_number(score.get(field), digits) for field, digits in _SCORE_FIELDS)]
        for name, score in rows
    ]
    if xz is not None:
        cells.append(["xz -9e after the training text", _number(xz, 3), "–", "–", "–"])
    sizes = [f"{scores[field]:,} {field}" for field in ("documents", "words", "tokens", "bytes") if scores.get(field)]
    note = f"Measured on the {html.escape(str(scores.get('split', 'held-out')))} split: {', '.join(sizes)}."
    caption = f"{unit.capitalize()} of held-out text under different generation orders, from one set of weights."
    header = ["order", "bits per byte", "nats per token", "perplexity per token", "perplexity per word"]
    figure = _figure(pictures, "bits.png", caption)
    return f'{title}<p class="note">{note}</p>{_table(header, cells)}{figure}'


_SCORE_FIELDS = (("nats_per_token", 4), ("perplexity_per_token", 2), ("perplexity_per_word", 2))


def _timed(drawn: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One sample for each number of streams, of those that hold what the speed table needs; fewest streams first."""
    needed = ("streams", "num_calls", "tokens_per_second")
    samples = [s for s in (drawn or {}).get("samples", []) if all(s.get(name) for name in needed)]
    first = {sample["streams"]: sample for sample in reversed(samples)}
    return [first[streams] for streams in sorted(first)]


def _speed(drawn: dict[str, Any] | None, pictures: dict[str, bytes], where: str) -> str:
    title = "<h2>How fast it writes</h2>"
    timed = _timed(drawn)
    if not drawn or not timed:
        return title + _missing("Not measured yet", f"armd sample --run={where}")
    pictures["speed.png"] = plots.speed(timed)
    base = next((sample["tokens_per_second"] for sample in timed if sample["streams"] == 1), None)
    cells = [
        [
            f"S = {sample['streams']}",
            f"{sample['num_calls']:,}",
            _number(sample["tokens_per_second"], 0 if sample["tokens_per_second"] >= 100 else 1),
            f"×{sample['tokens_per_second'] / base:.2f}" if base else "–",
        ]
        for sample in timed
    ]
    facts = [f"{drawn['length']} tokens a text" if drawn.get("length") else ""]
    facts += [f"batch {drawn['batch']}" if drawn.get("batch") else "", str(drawn.get("hardware") or "")]
    note = html.escape("; ".join(fact for fact in facts if fact))
    caption = "S streams are written side by side, so a text needs fewer network calls."
    table = _table(["streams", "network calls", "tokens per second", "against S = 1"], cells)
    return f'{title}<p class="note">{note}</p>{table}{_figure(pictures, "speed.png", caption)}'


def _samples(drawn: dict[str, Any] | None, pictures: dict[str, bytes], where: str) -> str:
    title = "<h2>What it writes</h2>"
    samples = sorted((drawn or {}).get("samples", []), key=lambda sample: sample.get("streams", 0))
    if not drawn or not samples:
        return title + _missing("No samples yet", f"armd sample --run={where}")
    coloured = [sample for sample in samples if _has_calls(sample)]
    if coloured:
        first = {sample["streams"]: sample for sample in reversed(coloured)}
        pictures["samples.png"] = plots.samples([first[streams] for streams in sorted(first)])
    parts = [
        title,
        '<p class="note">The colour of a token tells which network call made it: dark tokens were written early, light'
        " ones late. With S streams, S tokens that stand far apart share a call and so a colour."
        " Touch or point at a token to read the number of its call.</p>",
    ]
    for sample in samples:
        calls = f" in {sample['num_calls']} network calls" if sample.get("num_calls") else ""
        streams = sample.get("streams", 1)
        parts.append(f"<h3>{streams} stream{'s' if streams != 1 else ''}{calls}</h3>{_coloured_text(sample)}")
    facts = [f"{name} {drawn[name]}" for name in ("temperature", "seed") if drawn.get(name) is not None]
    if facts:
        parts.append(
            f'<p class="note">{html.escape(", ".join(facts))}; samples.png shows the first text of each kind.</p>'
        )
    return "".join(parts)


def _has_calls(sample: dict[str, Any]) -> bool:
    pieces, calls = sample.get("pieces"), sample.get("calls")
    return bool(pieces and calls and len(pieces) == len(calls) and sample.get("num_calls"))


def _coloured_text(sample: dict[str, Any]) -> str:
    if not _has_calls(sample):
        return f'<div class="text">{html.escape(sample.get("text", ""))}</div>'
    total = max(sample["num_calls"], *sample["calls"])
    spans = []
    for piece, call in zip(sample["pieces"], sample["calls"], strict=True):
        color = plots.call_color(call, total)
        title = f"call {call} of {total}" if call else "given as prompt"
        style = f"background:{color};color:{plots.ink_on(color)}"
        spans.append(f'<span style="{style}" title="{title}">{html.escape(piece)}</span>')
    stops = ",".join(plots.call_color(1 + round(i / 8 * (total - 1)), total) for i in range(9))
    given = f'<i class="given" style="background:{plots.GIVEN}"></i> given' if 0 in sample["calls"] else ""
    legend = f'call 1 <i style="background:linear-gradient(to right,{stops})"></i> call {total} {given}'
    return f'<div class="legend">{legend}</div><div class="text">{"".join(spans)}</div>'


def _training(rows: list[dict[str, Any]], config: Config, pictures: dict[str, bytes], where: str) -> str:
    title = "<h2>How training went</h2>"
    if not rows:
        return title + _missing("No steps logged yet", f"armd train --config=FILE --workdir={where}")
    pictures["loss.png"] = plots.loss(rows, config)
    caption = (
        "Loss in nats per token over the training steps, and the learning rate below. Training measures it under the"
        " orders of the moment, held-out text always left to right. Shaded: the phases of the order schedule."
    )
    return title + _figure(pictures, "loss.png", caption)


def _curriculum(config: Config, pictures: dict[str, bytes]) -> str:
    pictures["curriculum.png"] = plots.curriculum(config)
    caption = (
        "Top: the order schedule of this run. Letters mark steps; below, for each of them, an order that training draws"
        " there: a point says which position of the text is generated as the n-th token. A straight diagonal is reading"
        " order; points of one colour are generated together or nearly so."
    )
    return f"<h2>In which order it learns to write</h2>{_figure(pictures, 'curriculum.png', caption)}"


def _masks(pictures: dict[str, bytes]) -> str:
    pictures["masks.png"] = plots.masks()
    caption = (
        "The two block masks for eight tokens under every kind of order. Rows are tokens to predict, columns the tokens"
        " they may look at, both in generation order and labelled with their position in the text; white lines part the"
        " blocks. The strictly causal mask hides a token's own block, the causal one shows it."
    )
    return f"<h2>Who may look at whom</h2>{_figure(pictures, 'masks.png', caption, wide=True)}"
