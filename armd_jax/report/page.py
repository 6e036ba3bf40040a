"""`armd report --run=DIR`: one self-contained HTML page about a run, and its pictures as PNG files beside it.

The page reads the files that other commands left in the run's folder (config.json, metrics.jsonl, events.jsonl,
eval.json, suites.json, generation.json, samples.json). Only config.json has to be there. If another file is missing,
its section names the command that writes it; those about suites and about what a judge said are left out.
"""

import dataclasses
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any, assert_never

from armd_jax import config as configs
from armd_jax import data_config, files
from armd_jax.config import Config
from armd_jax.core import task as tasks
from armd_jax.errors import UserError
from armd_jax.evaluation import generative_results, results, suites_results, tables
from armd_jax.evaluation.generative_results import Generations
from armd_jax.evaluation.results import Evaluation, Sample, Samples
from armd_jax.report import (
    bars,
    frontier,
    loss_curve,
    markup,
    masks,
    order_schedule,
    places,
    replay,
    sample_text,
    suites,
    time_spent,
)
from armd_jax.training import goodput
from armd_jax.training.goodput import Goodput


@dataclasses.dataclass(frozen=True)
class _Section:
    """A part of the page, and the PNG files that are written beside the page, by name."""

    html: str
    pictures: dict[str, bytes] = dataclasses.field(default_factory=dict)


def write(run: pathlib.Path, out: pathlib.Path | None = None) -> pathlib.Path:
    """Writes `report.html` and its PNG files and returns the path of the page.

    out: the folder to write them into, made if it is missing; None: the run's.

    Everything is drawn before the first file is written, and every file is written whole or not at all.
    Raises UserError if `run` is neither a run nor an export, if one of its files cannot be read, or if the folder
    cannot be written.
    """
    config, out = configs.read(run), run if out is None else out
    rows, events = _read_log(run / "metrics.jsonl"), _read_log(run / "events.jsonl")
    evaluation, drawn = results.read_evaluation(run), results.read_samples(run)
    where = f"--run={shlex.quote(str(run))}"
    sections = [
        _headline(evaluation, drawn, where),
        _quality(evaluation, where),
        *_over_orders(evaluation),
        *_price(evaluation),
        *[_Section(suites.section(found)) for found in [suites_results.read(run)] if found],
        _speed(drawn, where),
        _samples(drawn, where),
        *_generation(generative_results.read(run)),
        _training(rows, config, f"--workdir={shlex.quote(str(run))}"),
        *_time_spent(goodput.of(events)),
        *([_order_schedule(config), _masks()] if config.model.has_orders else []),
    ]
    name = run.resolve().name
    page = markup.page(
        title=f"{name}: training report",
        heading=f"{name}: {_model(config)}",
        facts=_facts(config, rows, events),
        body=[
            *(section.html for section in sections),
            markup.heading("Configuration"),
            markup.details("every field", configs.to_json(config)),
        ],
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for section in sections:
            for picture, png in section.pictures.items():
                files.write(out / picture, png)
        # The name of a folder need not be text.
        files.write(out / "report.html", page.encode("utf-8", errors="replace"))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{out}: the report cannot be written there: {reason}; --out=FOLDER takes another") from error
    return out / "report.html"


def _read_log(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a log that belong to a step."""
    return [row for row in files.read_json_lines(path) if isinstance(row.get("step"), int)]


def _model(config: Config) -> str:
    """The kind of model, with an article."""
    match config.model.kind:
        case "armd":
            return "an auto-regressive masked diffusion model"
        case "denoiser":
            return "a masked diffusion model"
        case _:
            assert_never(config.model.kind)


def _facts(config: Config, rows: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> list[str]:
    """What was trained, in a few lines."""
    model, training = config.model, config.training
    done = max([row["step"] for row in [*rows, *events]], default=0)
    resumed = sum(event.get("event") == "resume" for event in events)
    times = f", resumed {resumed} time{'s' if resumed > 1 else ''}" if resumed else ""
    two_stream = f" ({model.two_stream_layers} of them two-stream)" if model.has_orders else ""
    return [
        f"{done:,} of {training.num_steps:,} training steps{times}",
        f"{model.num_layers} layers{two_stream}, width {model.width},"
        f" {model.num_heads} heads, rows of {model.max_length} tokens",
        f"{tasks.of(config).describe}; batches of {training.batch_size} rows",
        f"text: {data_config.described(config.data) or 'the embedded corpus'}; tokenizer: {config.data.tokenizer}",
    ]


def _headline(evaluation: Evaluation | None, drawn: Samples | None, where: str) -> _Section:
    cards = []
    if evaluation:
        exact, orders, xz = evaluation.left_to_right, evaluation.random_orders, evaluation.xz_bits_per_byte
        score, way = (exact, "left to right") if exact else (evaluation.elbo, "masked diffusion")
        kind = "exact" if exact else "a bound: ELBO"
        bits = "–" if score is None else results.formatted_bits(score, evaluation.lossless, 3)
        cards.append((bits, f"bits per byte, {way} ({evaluation.split} text, {kind})"))
        if xz is not None:
            cards.append((results.formatted(xz, 3), "bits per byte, xz -9e after the training text"))
        if orders:
            bits = results.formatted_bits(orders, evaluation.lossless, 3)
            cards.append((bits, "bits per byte, expected over random orders"))
        perplexity = None if score is None else score.perplexity_per_token
        cards.append((results.formatted(perplexity, 2), f"perplexity per token, {way}" + ("" if exact else " (bound)")))
    strided = [sample for sample in _timed(drawn) if sample.mode is None]
    rates = {sample.streams: sample.tokens_per_second for sample in strided if sample.streams is not None}
    if 1 in rates and len(rates) > 1:
        most = max(rates)
        cards.append((f"×{rates[most] / rates[1]:.2f}", f"tokens per second, {most} streams compared with 1"))
    if not cards:
        return _Section(markup.missing("There are no numbers yet", f"armd eval {where}"))
    return _Section(markup.cards(cards))


def _quality(evaluation: Evaluation | None, where: str) -> _Section:
    title = markup.heading("How well it predicts held-out text")
    if not evaluation:
        return _Section(title + markup.missing("This was not measured yet", f"armd eval {where}"))
    rows, lossless = results.rows(evaluation), evaluation.lossless
    cells = [
        [
            row.name,
            results.formatted_bits(row.score, lossless, 3),
            results.formatted(row.score.nats_per_token, 4),
            results.formatted(row.score.perplexity_per_token, 2),
            results.formatted(row.score.perplexity_per_word, 2),
        ]
        for row in rows
    ]
    held = {name: getattr(evaluation, name) for name in ("documents", "words", "tokens", "bytes")}
    sizes = ", ".join(f"{number:,} {name}" for name, number in held.items() if number)
    raw = results.raw_weights(evaluation.ema)
    note = f"Measured on the {evaluation.split} split" + (f": {sizes}{raw}." if sizes else f"{raw}.")
    header = ["order", "bits per byte", "nats per token", "perplexity per token", "perplexity per word"]
    html = title + markup.note(note) + markup.table(header, cells)
    unit = "bits per byte" if lossless else "nats per token"
    values = [(row, row.score.bits_per_byte if lossless else row.score.nats_per_token) for row in rows]
    known = [(row, value) for row, value in values if value is not None]
    if not known:
        return _Section(html)
    png = bars.likelihoods(known, unit)
    caption = f"{unit.capitalize()} of held-out text under different generation orders, all with the same weights."
    if evaluation.left_to_right is None:
        caption = f"{unit.capitalize()} of held-out text: a bound, the true figure is at most that high."
    return _Section(html + markup.figure(png, caption), {"bits.png": png})


def _over_orders(evaluation: Evaluation | None) -> list[_Section]:
    """Nothing if bounds were not asked for."""
    if evaluation is None or evaluation.order_bounds is None:
        return []
    found = evaluation.order_bounds
    header, *cells = tables.bounds_table(found)
    html = markup.heading("How well all orders together predict it")
    html += markup.note(tables.bounds_title(found)) + markup.table(header, cells)
    return [_Section(html + markup.note(f"{tables.bounds_note(found)} Errors are standard errors over the draws."))]


def _price(evaluation: Evaluation | None) -> list[_Section]:
    """Nothing if the price was not asked for."""
    if evaluation is None or not evaluation.price:
        return []
    header, *cells = tables.price_table(evaluation.price)
    html = markup.heading("What streams side by side cost")
    html += markup.note(tables.PRICE_TITLE) + markup.table(header, cells)
    html += markup.note(
        "The independence gap is what predicting the tokens of a block together costs against the same sequence one"
        " token at a time, and the cost of the order is what that sequence costs against left to right. Errors are"
        " standard errors over rows. A cold start is what a stream costs beyond its late average."
    )
    png = places.picture(evaluation.price)
    caption = "Nats per token by place in the stream: its head is predicted without the token before it."
    header, *cells = tables.places_table(evaluation.price)
    html += markup.figure(png, caption) + markup.table(header, cells)
    return [_Section(html, {"places.png": png})]


def _timed(drawn: Samples | None) -> list[Sample]:
    """One sample for each way of writing, of those whose speed is known; fewest streams or steps first."""
    samples = drawn.samples if drawn else ()
    return _first_of_each([sample for sample in samples if sample.num_calls > 0 and sample.tokens_per_second > 0])


def _first_of_each(samples: Sequence[Sample]) -> list[Sample]:
    first = {sample.way: sample for sample in reversed(samples)}
    return [first[way] for way in sorted(first)]


def _speed(drawn: Samples | None, where: str) -> _Section:
    title = markup.heading("How fast it writes")
    timed = _timed(drawn)
    if not drawn or not timed:
        return _Section(title + markup.missing("This was not measured yet", f"armd sample {where}"))
    in_streams = any(sample.streams is not None for sample in timed)
    base = next((sample.tokens_per_second for sample in timed if sample.streams == 1), None)
    cells = [
        [
            sample.label,
            f"{sample.num_calls:,}",
            results.formatted(sample.tokens_per_second, 0 if sample.tokens_per_second >= 100 else 1),
            *([f"×{sample.tokens_per_second / base:.2f}" if base else "–"] if in_streams else []),
        ]
        for sample in timed
    ]
    facts = [
        f"{drawn.length:,} tokens per text" if drawn.length else "",
        f"batches of {drawn.batch:,}" if drawn.batch else "",
        drawn.hardware,
    ]
    note = markup.note("; ".join(fact for fact in facts if fact))
    header = ["streams" if in_streams else "sampler", "NFE (network calls)", "tokens per second"]
    table = markup.table([*header, *(["compared with S = 1"] if in_streams else [])], cells)
    png = bars.speed(timed)
    caption = "Every network call reads the whole text, and fewer calls fill in more tokens at once."
    if in_streams:
        caption = "S streams are written side by side, so that a text needs fewer network calls."
    return _Section(title + note + table + markup.figure(png, caption), {"speed.png": png})


def _samples(drawn: Samples | None, where: str) -> _Section:
    title = markup.heading("What it writes")
    if not drawn or not drawn.samples:
        return _Section(title + markup.missing("There are no samples yet", f"armd sample {where}"))
    together = "Tokens that were filled in by the same call have the same colour."
    in_streams = any(sample.streams is not None for sample in drawn.samples)
    if in_streams:
        together = (
            "With S streams, S tokens that are far apart in the text are written by the same call and have the same"
            " colour."
        )
    parts = [
        title,
        markup.note(
            "The colour of a token tells which network call made it: dark tokens were written early, light ones late."
            f" {together} Touch a token or point at it to read the number of its call."
        ),
    ]
    named = [(_way(sample), sample) for sample in sorted(drawn.samples, key=lambda sample: sample.way)]
    parts.append(replay.panel(named))
    for name, sample in named:
        parts.append(markup.subheading(name) + markup.sample_text(sample))
    settings = {"temperature": drawn.temperature, "top-k": drawn.top_k, "top-p": drawn.top_p, "seed": drawn.seed}
    facts = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    coloured = [sample for sample in drawn.samples if markup.has_calls(sample)]
    pictures = {"samples.png": sample_text.picture(_first_of_each(coloured))} if coloured else {}
    if facts:
        parts.append(markup.note(f"Drawn with {facts}."))
    if pictures:
        each = "number of streams" if in_streams else "sampler and number of steps"
        parts.append(markup.note(f"The file samples.png shows the first text of each {each}."))
    return _Section("".join(parts), pictures)


def _generation(found: Generations | None) -> list[_Section]:
    """A table and a picture of every group of settings that can be compared; nothing if no judge was asked."""
    if found is None or not found.entries:
        return []
    parts = [
        markup.heading("What a judge says of its texts"),
        markup.note(
            "Perplexity under the judge falls with the temperature, and so does the entropy of the tokens within a"
            " text: dull texts are easy to predict. Compare ways of writing at equal entropy, and with real text."
        ),
    ]
    pictures = {}
    for number, group in enumerate(generative_results.groups(found.entries)):
        png = frontier.picture(group)
        rows = [generative_results.cells(entry) for entry in group]
        parts.append(markup.note(generative_results.heading(group)))
        parts.append(markup.table(generative_results.HEADER, rows))
        parts.append(
            markup.figure(
                png,
                "Generative perplexity (± its standard error) against the entropy of tokens within a text, at the"
                " temperatures that the points are labelled with, and against tokens per second. Further right and"
                " lower is better; the star and the dotted line are real text.",
            )
        )
        pictures["frontier.png" if not number else f"frontier-{number + 1}.png"] = png
    return [_Section("".join(parts), pictures)]


def _way(sample: Sample) -> str:
    """How a sample was written, in words."""
    calls = f" in {sample.num_calls:,} network calls" if sample.num_calls else ""
    if sample.streams is None:
        return sample.label + calls
    mode = "" if sample.mode is None else f"{sample.mode}, "
    return f"{mode}{sample.streams} stream{'s' if sample.streams != 1 else ''}{calls}"


def _training(rows: Sequence[dict[str, Any]], config: Config, where: str) -> _Section:
    title = markup.heading("How training went")
    if not rows:
        return _Section(title + markup.missing("No steps were logged yet", f"armd train --config=FILE {where}"))
    trained = tasks.of(config)
    png = loss_curve.picture(rows, trained.phases)
    held_out = (
        "for held-out text it is a bound, the negative ELBO"
        if trained.bounds
        else "held-out text is always scored left to right"
    )
    caption = (
        "The loss in nats per token over the training steps, and the learning rate below it. The training loss is that"
        f" of the {trained.drawn} which are drawn at each step, and {held_out}. The coloured bands are the phases of"
        " the schedule."
    )
    return _Section(title + markup.figure(png, caption), {"loss.png": png})


def _time_spent(spent: Goodput | None) -> list[_Section]:
    """Nothing for a run that did not note its times, or took none."""
    if spent is None or not spent.wall_seconds:
        return []
    cells = [
        [time_spent.label(category), f"{seconds:,.1f}", f"{share:.1%}"]
        for category, seconds, share in time_spent.spent(spent)
    ]
    cells.append(["wall-clock", f"{spent.wall_seconds:,.1f}", "100.0%"])
    processes = f"{spent.processes:,} process{'es, one after another' if spent.processes > 1 else ''}"
    lost = f"; {spent.lost_steps:,} steps had to be trained again" if spent.lost_steps else ""
    png = time_spent.picture(spent)
    caption = "The wall-clock of the run, from the start of its first process to the last that its processes noted."
    html = markup.heading("Where the time went") + markup.note(f"{processes}{lost}.")
    html += markup.figure(png, caption) + markup.table(["activity", "seconds", "of the wall-clock"], cells)
    return [_Section(html, {"time.png": png})]


def _order_schedule(config: Config) -> _Section:
    png = order_schedule.picture(config)
    caption = (
        "Top: the order schedule of this run, with letters at some of its steps. Below: an order that training draws at"
        " each of these steps. A point says which position of the text is generated as the n-th token, so a straight"
        " diagonal is reading order. Colours go from the first block that is generated (dark) to the last (light), and"
        " points of exactly the same colour are generated together."
    )
    title = markup.heading("In which order it learns to write")
    return _Section(title + markup.figure(png, caption), {"curriculum.png": png})


def _masks() -> _Section:
    png = masks.picture()
    caption = (
        "The two block masks for eight tokens under every kind of order. Rows are tokens to predict, and columns are"
        " the tokens that they may look at. Both are in generation order and labelled with their position in the text,"
        " and thick white lines separate the blocks. The strictly causal mask hides a token's own block, and the causal"
        " mask shows it."
    )
    title = markup.heading("Which tokens may look at which")
    return _Section(title + markup.figure(png, caption, wide=True), {"masks.png": png})
