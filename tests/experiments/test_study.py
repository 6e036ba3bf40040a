"""The study: its rows are what the page says of them, and the page is what the figures say."""

import dataclasses
import importlib
import json
import math
import pathlib
import sys

import pytest

from armd_jax.cli import main as cli
from armd_jax.core import flops, parameters
from armd_jax.errors import UserError
from armd_jax.report import sweep_reading
from armd_jax.report.sweep_statistics import Estimate
from armd_jax.studies import plan as plans

FOLDER = pathlib.Path(__file__).parents[2] / "experiments/study"
NAMES = ("study", "figures", "tables", "pictures", "write_up")


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
    main = set(study["figures"].MAIN) - {study["figures"].LONG}
    equal = [job for job, _ in models if job.member.row in main]
    assert len(equal) == 5 * form.seeds and {job.config.training.num_steps for job in equal} == {form.steps}
    work = {
        job.member.row: flops.training_flops_per_token(model).total * job.config.training.num_steps
        for job, model in models
    }
    left_out = {"model=MDLM-equal-FLOPs"} if arg == "minutes" else set()
    for row in set(study["figures"].EQUAL_FLOPS) - left_out:
        assert work[row] == pytest.approx(work["model=ARMD-curriculum"], rel=0.6 / form.steps)
    assert any(job.name == form.judge for job in plan.jobs)


def test_the_short_form_is_what_is_said_of_it(study):
    """Its steps in the help, on the page and in the config are those that it has."""
    words = f"one seed and {study['study'].FORMS['minutes'].steps} steps"
    for file in (FOLDER / "study.py", FOLDER / "README.md", FOLDER.parents[1] / "launch/study.sh"):
        assert words in file.read_text()


@pytest.mark.parametrize(
    ("seconds", "words"), [(29, "0 min"), (535, "9 min"), (3600, "1 h 0 min"), (9696, "2 h 42 min")]
)
def test_times_are_to_the_nearest_minute(study, seconds, words):
    """Hours only if there are any."""
    assert study["tables"]._time(seconds) == words


def test_the_page_is_what_the_figures_say(study):
    """No figure on the page differs from metrics.json, whoever edits it."""
    assert study["write_up"].page(FOLDER / "metrics.json") == (FOLDER / "README.md").read_text()
    assert {file.name for file in FOLDER.glob("*.png")} == {"curves.png", "frontier.png", "sizes.png"}


def test_no_model_is_held_back_by_its_learning_rate(study):
    """AR and MDLM have the rate with the lowest held-out loss of those tried, and lower and higher ones were tried.

    ARMD has one that lies between others too; if it is not the best of them, the page says which is, and by how much.
    In the whole training, ARMD has the better of two, and what AR might gain is little beside its distance to ARMD.
    """
    _, sweep = study["write_up"].read(FOLDER / "metrics.json")
    page = (FOLDER / "README.md").read_text().split("Half of the chosen rate")[0]
    for kind, rates in study["study"].RATES.items():
        losses, chosen = study["tables"].rate_losses(sweep, kind), study["study"].BEST[kind]
        if len(losses) < len(rates):
            pytest.skip(f"the study on the page is not finished: {kind} has {len(losses)} of {len(rates)} rates")
        best = min(losses, key=losses.__getitem__)
        assert min(rates) < chosen < max(rates)
        assert best == chosen or kind == "ARMD-identity"
        found = "the chosen one" if best == chosen else f"{best:g}, by {losses[chosen] - losses[best]:.3f}"
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {kind} |") and f"{chosen:g}: **" in line]
        assert row.endswith(f"| {found} |")
    ar, armd = (study["tables"].rate_losses(sweep, kind, whole=True) for kind in study["study"].HALVED)
    ar_chosen, armd_chosen = ar[study["study"].BEST["AR"]], armd[study["study"].BEST["ARMD-identity"]]
    assert len(ar) == len(armd) == 2 and armd_chosen == min(armd.values())
    assert ar_chosen - min(ar.values()) < (ar_chosen - armd_chosen) / 10


@pytest.mark.parametrize(
    ("limit", "better", "measured", "more", "verdict"),
    [
        (1.0, "lower", Estimate(0.7, 0.05, 3), {}, "met"),
        (1.0, "lower", Estimate(0.8, 0.05, 3), {}, "met, but the limit is within the 95% interval"),  # 4.3 x 0.05 > 0.2
        (1.0, "lower", Estimate(1.3, 0.05, 3), {}, "**missed**"),
        (1.0, "lower", Estimate(1.3, None, 1), {}, "**missed** (one seed)"),
        (1.2, "higher", Estimate(1.5, 0.05, 3), {}, "met"),
        (1.2, "higher", Estimate(0.9, 0.05, 3), {}, "**missed**"),
        (1.0, "equal", Estimate(1.04, 0.01, 3), {}, "met: within the 95% interval"),
        (1.0, "equal", Estimate(1.05, 0.01, 3), {}, "**missed**"),
        (1.0, "equal", Estimate(1.0, None, 1), {}, "one seed: no verdict"),
        (1.0, "lower", None, {}, "not measured"),
        (1.0, "lower", Estimate(0.5, 0.0, 2), {"never": 1}, "**missed**: 1 of the seeds never reach it"),
        (1.0, "lower", Estimate(0.5, 0.0, 3), {"undecided": "of the text"}, "not decided: of the text"),
        (0.3, "lower", Estimate(0.5, 0.0, 3), {"bound": "≤"}, "not decided: the figure is only a bound"),
        (0.3, "lower", Estimate(0.2, 0.0, 3), {"bound": "≤"}, "met by the bound"),
        (1.2, "higher", Estimate(1.5, 0.05, 3), {"bound": "≤"}, "met by the bound"),
    ],
)
def test_verdicts(study, limit, better, measured, more, verdict):
    """A claim is met or missed, and it is said if the limit is within the 95% interval, or if nothing is decided."""
    assert study["figures"].Claim("", limit, better, measured, **more).verdict() == verdict


def test_a_power_law_is_found_again(study):
    """The fit gives the factor and the exponent that losses were made with."""
    sizes = [1e6, 2e6, 8e6]
    factor, exponent = study["figures"].power_law(sizes, [7 * size**-0.1 for size in sizes])
    assert math.isclose(factor, 7, rel_tol=1e-9) and math.isclose(exponent, 0.1, rel_tol=1e-9)


def test_figures_are_collected_of_finished_members(study, make_sweep, tmp_path, monkeypatch):
    """They go through the file unchanged, others are left out and counted, and every name of the template is filled."""
    monkeypatch.setattr(sys, "argv", ["write_up.py", f"--sweep={make_sweep()}", f"--out={tmp_path / 'page'}"])
    assert study["write_up"].main() == 0
    measured, sweep = study["write_up"].read(tmp_path / "page/metrics.json")
    assert measured["seconds"] is None and measured["planned"] == 10 and len(sweep.members) == 8
    assert [one.seed for one in sweep.finished("model=AR")] == [0, 1, 2]
    figures = sweep.finished("model=MDLM")[1].figures
    assert figures["likelihood.nats_per_token"] == 8.0 and figures["metrics.eval/nll"] == 3.0
    text = (tmp_path / "page/README.md").read_text()
    assert "8 of 10 trainings" in text and "$" not in text
    assert "| owt_small | v5e:4x4 | 552 to 1,574 |" in text
    (tmp_path / "page/conclusions.md").write_text("## What follows\n\nIt is true of $members.\n")
    first = study["write_up"].page(tmp_path / "page/metrics.json").split("## What was asked")[0]
    assert "\n\n## What follows\n\nIt is true of 8 of 10 trainings" in first
    assert "<!--" not in text and "## Aggregators" in text
    for wrong, reason in (("$5", "a dollar sign is written"), ("$stepz", "did you mean 'steps'")):
        (tmp_path / "page/conclusions.md").write_text(f"It is {wrong}.\n")
        with pytest.raises(UserError, match=reason):
            study["write_up"].page(tmp_path / "page/metrics.json")
    (tmp_path / "page/conclusions.md").unlink()
    figures = json.loads((tmp_path / "page/metrics.json").read_text())
    figures["measured"]["form"] = "minutes"  # a form without the short rows
    (tmp_path / "page/metrics.json").write_text(json.dumps(figures))
    short = study["write_up"].page(tmp_path / "page/metrics.json")
    assert not (tmp_path / "page/sizes.png").exists()  # this sweep has one size
    assert "## Aggregators" not in short and "## At full size" in short and "<!--" not in short
    (row,) = [
        line for line in text.splitlines() if line.startswith("| AR |") and "±" in line and "million" not in line
    ][:1]
    assert "| 1,600 |" in row and row.count("|") == 11


def test_real_text_that_was_judged_twice(study, make_sweep):
    """The figures of more texts count."""
    folder = make_sweep()
    judged = [{"text": "test split", "samples": count, "entropy_nats": count / 10} for count in (42, 128, 64)]
    (folder / "members/model=ARMD,seed=0/generation.json").write_text(json.dumps({"entries": judged}))
    sweep = sweep_reading.load(folder)
    renamed = [dataclasses.replace(one, row=one.row.replace("=ARMD", "=ARMD-curriculum")) for one in sweep.members]
    sweep = dataclasses.replace(sweep, members=tuple(renamed))
    assert study["figures"].of_real_text(sweep, "entropy_nats") == 12.8
    assert study["figures"].of_real_text(sweep, "mauve") is None


@pytest.mark.slow
def test_a_sweep_becomes_a_page(study, tmp_path, corpus, monkeypatch):
    """The rows with everything that is measured of them, in their smallest form: trained, judged and written up."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # toy models: compiling takes longer than running
    out = tmp_path / "out"
    sweep = ["sweep", f"--config={FOLDER / 'study.py'}:smoke", f"--out={out}", f"--config.data.path={corpus}"]
    sweep += ["--config.data.tokenizer=bytes", "--config.data.valid_fraction=0.2"]
    sweep += ["--config.data.test_fraction=0.2"]
    for only in ("judge=*", "model=ARMD-curriculum"):
        assert cli.main([*sweep, f"--only={only}"]) == 0
    monkeypatch.setattr(sys, "argv", ["write_up.py", f"--sweep={out}", "--jobs=1", f"--out={tmp_path / 'page'}"])
    assert study["write_up"].main() == 0
    text = (tmp_path / "page/README.md").read_text()
    planned = len(_plan(tmp_path / "planned", corpus, "smoke").jobs)
    assert f"2 of {planned} trainings" in text and "Trainings at a time: 1." in text
    generated = next(line for line in text.splitlines() if line.startswith("| strided, S = 8 |"))
    assert all(cell.strip() for cell in generated.strip("|").split("|"))


def test_a_sweep_without_a_finished_member_is_one_line(study, make_sweep, tmp_path, capsys, monkeypatch):
    """And nothing is written."""
    folder = make_sweep()
    for file in folder.glob("members/*/member.json"):
        file.unlink()
    monkeypatch.setattr(sys, "argv", ["write_up.py", f"--sweep={folder}", f"--out={tmp_path / 'page'}"])
    assert study["write_up"].main() == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "page/metrics.json").exists()
