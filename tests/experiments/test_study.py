"""The study: its rows are what the page says of them, and the page is what the figures say."""

import dataclasses
import importlib
import json
import math
import pathlib
import sys

import pytest

from armd_jax.core import flops, parameters
from armd_jax.report.sweep_statistics import Estimate
from armd_jax.studies import plan as plans

FOLDER = pathlib.Path(__file__).parents[2] / "experiments/study"
NAMES = ("study", "tables", "pictures", "write_up")


@pytest.fixture
def study(monkeypatch):
    """The modules of the study's folder by name, imported as its scripts import them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def _plan(tmp_path, corpus, arg: str):
    spec = f"{FOLDER / 'study.py'}:{arg}"
    return plans.make(plans.load(spec, [f"--config.data.path={corpus}"]), spec, tmp_path / "out", lambda words: None)


@pytest.mark.parametrize("arg", ["", "minutes", "smoke", "gpu"])
def test_rows_are_of_one_size_and_see_as_much(study, tmp_path, corpus, arg):
    """All members of a width have as many parameters, to a thousandth; those at equal steps see as many tokens."""
    form = study["study"].FORMS[arg]
    plan = _plan(tmp_path, corpus, arg)
    models = [(job, dataclasses.replace(job.config.model, vocab_size=form.vocabulary)) for job in plan.jobs]
    for width in {model.width for _, model in models}:
        counts = [parameters.count(model) for _, model in models if model.width == width]
        assert max(counts) / min(counts) < 1.001
    equal = [job for job, _ in models if job.member.row in study["tables"].MAIN]
    assert len(equal) == 4 * form.seeds and {job.config.training.num_steps for job in equal} == {form.steps}
    work = {
        job.member.row: flops.training_flops_per_token(model).total * job.config.training.num_steps
        for job, model in models
    }
    for row in study["tables"].EQUAL_FLOPS:
        assert work[row] == pytest.approx(work["model=ARMD-curriculum"], rel=0.6 / form.steps)
    assert any(job.name == form.judge for job in plan.jobs)


def test_the_page_is_what_the_figures_say(study):
    """No figure on the page differs from metrics.json, whoever edits it."""
    assert study["write_up"].page(FOLDER / "metrics.json") == (FOLDER / "README.md").read_text()
    assert {file.name for file in FOLDER.glob("*.png")} == {"curves.png", "frontier.png", "sizes.png"}


def test_chosen_rates_are_the_best_that_were_tried(study):
    """Each kind of model has the rate with the lowest held-out loss, and lower and higher ones were tried."""
    _, sweep = study["write_up"].read(FOLDER / "metrics.json")
    for kind, rates in study["study"].RATES.items():
        rows = {rate: f"rate={kind}-{rate:g}" for rate in rates} | {study["study"].BEST[kind]: f"size=192-{kind}"}
        losses = {rate: sweep.finished(row)[0].figures["metrics.eval/nll"] for rate, row in rows.items()}
        best = min(losses, key=losses.__getitem__)
        assert best == study["study"].BEST[kind] and min(losses) < best < max(losses)


@pytest.mark.parametrize(
    ("limit", "better", "measured", "verdict"),
    [
        (1.0, "lower", Estimate(0.9, 0.05, 3), "met"),
        (1.0, "lower", Estimate(0.98, 0.05, 3), "met, but within a standard error of the limit"),
        (1.0, "lower", Estimate(1.2, 0.05, 3), "**missed**"),
        (1.0, "lower", Estimate(1.2, None, 1), "**missed**"),
        (1.2, "higher", Estimate(1.3, 0.05, 3), "met"),
        (1.2, "higher", Estimate(1.1, 0.05, 3), "**missed**"),
        (1.0, "equal", Estimate(1.01, 0.02, 3), "met, within a standard error"),
        (1.0, "equal", Estimate(1.03, 0.02, 3), "met within two"),
        (1.0, "equal", Estimate(1.05, 0.02, 3), "**missed**"),
        (1.0, "lower", None, "not measured"),
    ],
)
def test_verdicts(study, limit, better, measured, verdict):
    """A claim is met or missed, and how near the limit is, is said."""
    assert study["tables"].Claim("", limit, better, measured).verdict() == verdict


def test_a_power_law_is_found_again(study):
    """The fit gives the factor and the exponent that losses were made with."""
    sizes = [1e6, 2e6, 8e6]
    factor, exponent = study["tables"].power_law(sizes, [7 * size**-0.1 for size in sizes])
    assert math.isclose(factor, 7, rel_tol=1e-9) and math.isclose(exponent, 0.1, rel_tol=1e-9)


def test_figures_are_collected_from_a_finished_sweep_only(study, make_sweep, tmp_path, capsys, monkeypatch):
    """An unfinished member is named in one line; figures of finished ones go through the file unchanged."""
    folder = make_sweep()
    monkeypatch.setattr(sys, "argv", ["write_up.py", f"--sweep={folder}", f"--out={tmp_path / 'page'}"])
    assert study["write_up"].main() == 2
    assert "model=ARMD,seed=2" in capsys.readouterr().err and not (tmp_path / "page/metrics.json").exists()
    record = json.loads((folder / "sweep.json").read_text())
    record["members"] = [one for one in record["members"] if one["row"] in ("model=AR", "model=MDLM")]
    (folder / "sweep.json").write_text(json.dumps(record))
    assert study["write_up"].main() == 0
    measured, sweep = study["write_up"].read(tmp_path / "page/metrics.json")
    assert measured["seconds"] is None and [one.seed for one in sweep.finished("model=AR")] == [0, 1, 2]
    figures = sweep.finished("model=MDLM")[1].figures
    assert figures["likelihood.nats_per_token"] == 8.0 and figures["metrics.eval/nll"] == 3.0
    text = (tmp_path / "page/README.md").read_text()
    assert "| AR |" in text and "≤" in text and "$" not in text
