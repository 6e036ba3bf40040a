"""The figures of a sweep's tables are those that one computes by hand; what is not finished is in none of them."""

import csv
import io
import json
import math

import pytest

from armd_jax.config import ModelConfig
from armd_jax.core import flops
from armd_jax.errors import UserError
from armd_jax.report import sweep_curves, sweep_figures, sweep_reading, sweep_tables, sweep_text
from armd_jax.report import sweep_statistics as statistics

BITS = "likelihood.bits_per_byte"


def _tables(folder, *args, **kwargs) -> sweep_tables.Tables:
    return sweep_tables.make(sweep_reading.load(folder), *args, **kwargs)


def _row(tables, name) -> sweep_tables.Row:
    return next(row for row in tables.rows if row.name == name)


def test_means_and_standard_errors(make_sweep):
    """Over seeds, with ddof = 1; one seed has no error."""
    tables = _tables(make_sweep())
    assert tables.figures == ("metrics.eval/nll", BITS, "eval.strided.4.bits_per_byte")
    bits = _row(tables, "model=AR").cells[BITS].value
    assert bits == statistics.Estimate(pytest.approx(2.2), pytest.approx(0.2 / math.sqrt(3)), 3)
    loss = _row(tables, "model=ARMD").cells["metrics.eval/nll"].value
    assert loss == statistics.Estimate(2.5, 0.0, 2)
    assert statistics.estimate([3.0]) == statistics.Estimate(3.0, None, 1)


def test_ratios_are_taken_seed_by_seed(make_sweep):
    """The mean of 1.0 / 2.0 and 3.3 / 2.2, which is not the ratio of the means."""
    tables = _tables(make_sweep())
    ratio = _row(tables, "model=ARMD").cells[BITS].ratio
    assert ratio == statistics.Estimate(pytest.approx(1.0), pytest.approx(0.5), 2)
    assert _row(tables, "model=AR").cells[BITS].ratio == statistics.Estimate(1.0, 0.0, 3)
    other = _row(_tables(make_sweep("other"), baseline="model=MDLM"), "model=AR").cells[BITS].ratio
    assert other == statistics.Estimate(pytest.approx(0.55), pytest.approx(0.05 / math.sqrt(3)), 3)
    assert statistics.paired_ratio({0: 1.0, 1: 2.0}, {1: 4.0, 2: 8.0}) == statistics.Estimate(0.5, None, 1)
    assert statistics.paired_ratio({0: 1.0}, {0: 0.0}) is None
    assert statistics.paired_ratio({0: 1.0, 1: 2.0, 2: 1.0}, {0: 1e-320, 1: 1.0, 2: 1e-320}).mean == 2.0


def test_what_is_not_finished_is_listed_and_in_no_mean(make_sweep):
    """Members that failed, are under way or ended early are named with the reason, and their figures count nowhere."""
    folder = make_sweep()
    early = folder / "members/model=AR,seed=2"
    lines = (early / "metrics.jsonl").read_text().splitlines(keepends=True)
    (early / "metrics.jsonl").write_text("".join(lines[:-2]))
    tables = _tables(folder)
    left_out = {member.name: (member.status, member.reason) for member in tables.left_out}
    assert left_out == {
        "model=AR,seed=2": ("under way", "metrics.jsonl ends at step 400 of 1,600"),
        "model=ARMD,seed=2": ("failed", "eval: out of memory"),
        "model=wide,seed=0": ("under way", "nothing of it is done, as far as armd sweep has noted"),
    }
    assert [(row.finished, row.members) for row in tables.rows] == [(2, 3), (3, 3), (2, 3), (0, 1)]
    assert _row(tables, "model=ARMD").cells[BITS].value.mean == pytest.approx(2.15)  # 0.1 of the failed one would pull
    assert _row(tables, "model=wide").cells[BITS].value is None
    text = sweep_text.markdown(tables)
    assert "| model=ARMD,seed=2 | failed | eval: out of memory |" in text and "| model=wide | 0 of 1 | – |" in text


def test_a_member_whose_commands_are_not_done_is_under_way(make_sweep):
    """If sweep.json says which commands follow the training, all of them have to be done."""
    folder = make_sweep()
    record = json.loads((folder / "sweep.json").read_text())
    record["members"][0]["after"] = ["eval --no-baselines", "eval --suite=all"]
    (folder / "sweep.json").write_text(json.dumps(record))
    first = sweep_reading.load(folder).members[0]
    assert (first.status, first.reason) == ("under way", "eval --suite=all is not done")


def test_a_figure_that_a_member_lacks_is_told(make_sweep):
    """The mean is that of the others, with their number, and the member is named; so is a loss that was not finite."""
    folder = make_sweep()
    with open(folder / "members/model=MDLM,seed=1/metrics.jsonl", "a") as file:
        file.write('{"step": 1600, "eval/nll": null}\n')
    tables = _tables(folder)
    assert tables.lacking == (
        ("model=MDLM,seed=1", "metrics.eval/nll"),
        ("model=AR,seed=2", "eval.strided.4.bits_per_byte"),
    )
    assert _row(tables, "model=MDLM").cells["metrics.eval/nll"].value == statistics.Estimate(4.0, 0.0, 2)
    text = sweep_text.markdown(tables)
    assert "≤ 4.0000 ± 0.0000 (2 seeds)" in text
    assert "| model=MDLM | ≤ 1.0159 ± 0.1270 (2 seeds) |" in text  # 4.0 / 3.5 and 4.0 / 4.5
    assert "| model=AR,seed=2 | finished | lacks eval.strided.4.bits_per_byte |" in text


def test_steps_to_equal_likelihood(make_sweep):
    """The first step at which the curve is as low as the other's end, linear in the logarithm of the step."""
    tables = _tables(make_sweep(), reach="model=MDLM")
    reached = {row.name: row.reached for row in tables.rows}
    # Seed 0: 4.0 is halfway from 5.0 after 100 steps to 3.0 after 400. Seed 1: 3.0 is reached after 400.
    assert [one.steps for one in reached["model=ARMD"]] == [pytest.approx(200.0), pytest.approx(400.0)]
    assert [one.speedup for one in reached["model=ARMD"]] == [pytest.approx(8.0), pytest.approx(4.0)]
    assert [one.steps for one in reached["model=AR"]][2] is None  # it ends at 4.5
    assert [one.steps for one in reached["model=MDLM"]] == [1600.0, 1600.0, 1600.0]
    text = sweep_text.markdown(tables)
    assert "| model=ARMD | 2 | 300 ± 100 | 6.00 ± 2.00 |" in text
    step = flops.training_flops_per_token
    cost = step(ModelConfig(max_length=64)).total / step(ModelConfig(kind="denoiser", max_length=64)).total
    assert [one.flops_saving for one in reached["model=ARMD"]] == [pytest.approx(8 / cost), pytest.approx(4 / cost)]
    assert "| model=AR | 3 | never in 1 of 3 | – | – |" in text
    lines = list(csv.DictReader(io.StringIO(sweep_text.steps_csv(tables))))
    assert [line["steps"] for line in lines if line["row"] == "model=AR"][2] == "never"
    assert statistics.first_reached([(100, 5.0), (200, 4.0)], 6.0) == (100.0, True)
    assert statistics.first_reached([(100, 5.0), (200, 4.0)], 3.9) is None
    assert statistics.first_reached([(100, 5.0), (200, 4.0), (300, 4.5), (400, 3.0)], 4.0) == (200.0, False)
    assert statistics.first_reached([], 1.0) is None


def test_the_best_is_marked_as_far_as_it_is_printed(make_sweep):
    """Lower or higher, whichever is better; means that are printed alike are all marked; nobody's size is the best."""
    folder = make_sweep()
    for seed, bits in enumerate((2.20001, 2.20002)):  # AR has 2.2
        file = folder / f"members/model=ARMD,seed={seed}/eval.json"
        values = {"split": "test", "left_to_right": {"bits_per_byte": bits, "accuracy": 0.5, "tokens": 7}}
        file.write_text(json.dumps(values))
    wanted = [BITS, "eval.left_to_right.accuracy", "metrics.eval/nll", "cost.tokens"]
    best = {
        row.name: [figure for figure, cell in row.cells.items() if cell.best] for row in _tables(folder, wanted).rows
    }
    assert best["model=AR"] == [BITS] and best["model=ARMD"] == [BITS, "metrics.eval/nll"] and best["model=MDLM"] == []
    assert "**2.2000 ± 0.0000**" in sweep_text.markdown(_tables(folder, wanted))


@pytest.mark.parametrize(
    ("figure", "better"),
    [
        ("metrics.eval/nll", "lower"),
        ("metrics.train/loss", "lower"),
        ("generation.entries[streams=2].generative_perplexity", "neither"),
        ("generation.entries[streams=2].repetition", "neither"),
        ("eval.strided.4.bits_per_byte", "lower"),
        ("eval.elbo.standard_error", "neither"),
        ("eval.unigram.nats_per_token", "neither"),
        ("eval.xz_bits_per_byte", "neither"),
        ("eval.price.4.independence_gap", "lower"),
        ("eval.tokens", "neither"),
        ("suites.lambada.accuracy", "higher"),
        ("generation.entries[0].mauve", "higher"),
        ("generation.entries[0].distinct_2", "higher"),
        ("generation.entries[0].entropy_nats", "neither"),
        ("generation.entries[0].tokens_per_second", "higher"),
        ("metrics.train/learning_rate", "neither"),
        ("speed.seconds", "lower"),
        ("cost.steps", "neither"),
    ],
)
def test_which_way_is_better(figure, better):
    """A figure's name says whether less or more of it is better, or neither."""
    assert sweep_figures.better(figure) == better


def test_figures_have_names_for_people():
    """Dots inside brackets are part of a number."""
    assert sweep_figures.words("eval.strided.4.bits_per_byte") == "strided 4, bits per byte"
    name = "generation.entries[mode=strided,temperature=1.0].entropy_nats"
    assert sweep_figures.words(name) == "generation entries (mode=strided, temperature=1.0), entropy nats"


def test_bounds_are_marked(make_sweep):
    """The loss of a masked diffusion is an upper bound, and so is its ratio to an exact loss."""
    cells = _row(_tables(make_sweep()), "model=MDLM").cells
    assert [(cell.bound, cell.ratio_bound) for cell in cells.values()] == [("≤", "≤"), ("≤", "≤"), ("", "")]
    assert sweep_figures.bound(sweep_reading.load(make_sweep("mdlm")).members[3], "eval.elbo.standard_error") == ""
    exact = _row(_tables(make_sweep("other"), baseline="model=MDLM"), "model=AR").cells[BITS]
    assert (exact.bound, exact.ratio_bound) == ("", "≥")
    folder = make_sweep("suites")  # a model may validate by a bound and be scored exactly
    for row, bound in (("AR", True), ("MDLM", False)):
        figures = [{"set": "ptb", "bound": bound, "score": {"perplexity": 9.0, "tokens": 7}}]
        (folder / f"members/model={row},seed=0/suites.json").write_text(json.dumps({"figures": figures}))
    wanted = [f"suites.figures[set=ptb].score.{name}" for name in ("perplexity", "tokens")]
    tables = sweep_tables.make(sweep_reading.load(folder), wanted)
    marks = [[cell.bound for cell in _row(tables, f"model={row}").cells.values()] for row in ("AR", "MDLM")]
    assert marks == [["≤", ""], ["", ""]]
    folder = make_sweep("orders")
    for row, bounds in (("AR", {"nll_at_most": 4.0, "nll_at_least": 2.0}), ("MDLM", {})):
        file = folder / f"members/model={row},seed=0/eval.json"
        found = json.loads(file.read_text()) | {"order_bounds": {"bounds": {"4": bounds}}}
        file.write_text(json.dumps(found))
    wanted = [f"eval.order_bounds.bounds.4.nll_{end}" for end in ("at_most", "at_least")]
    cells = _row(sweep_tables.make(sweep_reading.load(folder), wanted), "model=AR").cells
    assert [cells[name].bound for name in wanted] == ["≤", "≥"]


def test_any_number_has_a_name(make_sweep):
    """By its dotted path, also in lists, by the settings of an item; and what the training cost."""
    folder = make_sweep()
    entries = [
        {"figure": 1.5, "mode": "strided", "streams": 2, "temperature": 1.0},
        {"figure": 2.5, "mode": "strided", "streams": 2, "temperature": 0.5},
        {"figure": 3.5, "mode": "lossless", "streams": 2, "temperature": 1.0},
    ]
    (folder / "members/model=AR,seed=0/generation.json").write_text(json.dumps({"entries": entries}))
    whole = "generation.entries[mode=strided,streams=2,temperature=1.0].figure"
    short = "generation.entries[mode=strided,temperature=1].figure"
    figures = _tables(folder, ["eval.price.4.independence_gap", whole, short, "cost.tokens", "cost.flops"])
    values = [cell.value.mean for cell in _row(figures, "model=AR").cells.values()]
    assert values[:4] == [0.5, 1.5, 1.5, 1600 * 2 * 64]
    assert values[4] == flops.training_flops_per_token(ModelConfig(max_length=64)).total * 1600 * 2 * 64
    with pytest.raises(UserError, match="fits 'generation.entries.mode=strided.*give more settings"):
        _tables(folder, ["generation.entries[streams=2].figure"])
    (folder / "members/model=AR,seed=1/generation.json").write_text(json.dumps({"entries": entries[2:]}))
    (folder / "members/model=AR,seed=0/generation.json").write_text(json.dumps({"entries": entries[:1]}))
    with pytest.raises(UserError, match="of model=AR,seed=0 and 'generation.*lossless.* of model=AR,seed=1; give more"):
        _tables(folder, ["generation.entries[streams=2].figure"])
    with pytest.raises(UserError, match="'eval.left_to_rigth.bits_per_byte': no finished member has it; did you mean"):
        _tables(folder, ["eval.left_to_rigth.bits_per_byte"])
    with pytest.raises(UserError, match="'qqq': no finished member has it; known, among others: metrics.eval/nll"):
        _tables(folder, ["qqq"])
    with pytest.raises(UserError, match="--reach='model=MDML': the sweep has no such row; did you mean 'model=MDLM'"):
        _tables(folder, reach="model=MDML")


def test_items_that_some_settings_do_not_tell_apart_have_more(make_sweep):
    """The same way of writing with another number of texts is another figure; the same once more has its place."""
    entries = [{"mode": "strided", "figure": 1.5, "samples": count} for count in (2, 4)]
    folder = make_sweep()
    (folder / "members/model=AR,seed=0/generation.json").write_text(json.dumps([*entries, *entries[:1]]))
    figures = sweep_reading.load(folder).members[0].figures
    assert [name for name in figures if name.endswith("figure")] == [
        "generation[0].figure",
        "generation[mode=strided,samples=4].figure",
        "generation[2].figure",
    ]


def test_every_file_has_a_table(make_sweep):
    """Suites and generation have tables of their own, of the rows that have such figures."""
    folder = make_sweep()
    score = {"nats": 3.0, "perplexity": 20.0}
    suites = [{"protocol": "sedd", "set": "ptb", "split": "test", "score": score, "words": 7}]
    drawn = [{"mode": "strided", "streams": 2, "temperature": 1.0, "generative_perplexity": 40.0, "entropy_nats": 4.5}]
    for seed in (0, 1):
        run = folder / f"members/model=ARMD,seed={seed}"
        (run / "suites.json").write_text(json.dumps({"figures": suites}))
        (run / "generation.json").write_text(json.dumps({"entries": [*drawn, {"text": "test split", "mauve": 1.0}]}))
    tables = _tables(folder)
    assert tables.figures[3:] == (
        "suites.figures[protocol=sedd,set=ptb,split=test].score.perplexity",
        "generation.entries[mode=strided,streams=2,temperature=1.0].generative_perplexity",
        "generation.entries[mode=strided,streams=2,temperature=1.0].entropy_nats",
    )
    titles = {table.title: [row[0] for row in table.cells] for table in sweep_text.shown_tables(tables)}
    assert titles["Figures: suites"] == titles["Figures: generation"] == ["model=ARMD"]
    assert len(titles["Figures: training and likelihood"]) == 4 and "Ratios to model=AR: suites" not in titles


def test_some_rows_alone(make_sweep):
    """Those that fit a pattern, and those that they are compared with."""
    sweep = sweep_reading.load(make_sweep())
    assert sweep_reading.only(sweep, ["model=A?", "model=w*"], ["model=MDLM"]).rows == (
        "model=AR",
        "model=MDLM",
        "model=wide",
    )
    with pytest.raises(UserError, match="--rows='model=ARDM': no row of the sweep fits; did you mean 'model=ARMD'"):
        sweep_reading.only(sweep, ["model=ARDM"], [])


def test_a_sweep_without_seeds_is_paired_by_that_of_the_config(make_sweep):
    """A row that was trained once, with the seed of the base, is compared with the same seed of another row."""
    folder = make_sweep()
    record = json.loads((folder / "sweep.json").read_text())
    next(one for one in record["members"] if one["name"] == "model=ARMD,seed=0")["seed"] = None
    (folder / "sweep.json").write_text(json.dumps(record))
    ratio = _row(_tables(folder), "model=ARMD").cells[BITS].ratio
    assert ratio == statistics.Estimate(pytest.approx(1.0), pytest.approx(0.5), 2)


def test_seconds_are_those_of_the_rates(make_sweep):
    """12,800 tokens at the next rate, 1280 per second, then 38,400 at it, then 153,600 at 2560 per second."""
    member = sweep_reading.load(make_sweep()).members[0]
    assert member.seconds() == {100: 10.0, 400: 40.0, 1600: 100.0}
    assert member.figures["speed.seconds"] == 100.0 and member.figures["speed.tokens_per_second"] == 2048.0


def test_curves_are_averaged_at_the_same_steps(make_sweep):
    """A seed that lacks an evaluation takes none from another step; tokens and FLOPs are those of the config."""
    folder = make_sweep()
    file = folder / "members/model=AR,seed=1/metrics.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines() if '"step": 400, "eval' not in line))
    sweep = sweep_reading.load(folder)
    found = sweep_curves.lines(sweep, "model=AR", "eval/nll", "tokens")
    assert found == [([12800, 204800], [6.0, last]) for last in (3.5, 3.0, 4.5)]
    assert sweep_curves.mean(found) == ([12800, 204800], [6.0, pytest.approx(11 / 3)])
    (xs, _), *_ = sweep_curves.lines(sweep, "model=MDLM", "eval/nll", "flops")
    assert xs[-1] == flops.training_flops_per_token(ModelConfig(kind="denoiser", max_length=64)).total * 204800
    assert sweep_curves.lines(sweep, "model=ARMD", "train/nll", "seconds")[0] == ([10.0, 40.0, 100.0], [6.0, 4.0, 3.5])
    assert sweep_curves.lines(sweep, "model=wide", "eval/nll", "steps") == []  # it is under way
    assert sweep_curves.thinned(([1, 2, 3, 4], [1.0, 3.0, 5.0, 8.0]), 2) == ([2, 4], [2.0, 6.5])


def test_csv_has_every_member_and_every_number(make_sweep):
    """A line for every member with its status, numbers to the last bit; speeds are in a file of their own."""
    sweep = sweep_reading.load(make_sweep())
    lines = list(csv.DictReader(io.StringIO(sweep_text.members_csv(sweep))))
    assert [line["status"] for line in lines] == ["finished"] * 8 + ["failed", "under way"]
    assert [float(line["likelihood.bits_per_byte"]) for line in lines[:3]] == [2.0, 2.2, 2.4]
    assert (lines[3]["model"], lines[3]["seed"]) == ("MDLM", "0")
    assert lines[3]["eval.left_to_right.bits_per_byte"] == ""
    assert not [name for name in lines[0] if "second" in name]
    (first, *_) = csv.DictReader(io.StringIO(sweep_text.members_csv(sweep, speed=True)))
    assert first["speed.seconds"] == "100.0" and first["metrics.train/tokens_per_second"] == "2560.0"
    tables = _tables(make_sweep("other"))
    found = {(line["row"], line["figure"]): line for line in csv.DictReader(io.StringIO(sweep_text.rows_csv(tables)))}
    line = found["model=ARMD", BITS]
    assert float(line["ratio"]) == _row(tables, "model=ARMD").cells[BITS].ratio.mean
    assert (line["seeds"], line["members"], line["best"]) == ("2", "3", "1")
