"""What members cost: counted, not run, and timed at no rate that nobody measured."""

import json

import jax
import pytest

import armd_jax as armd
from armd_jax import files
from armd_jax.cli import main as cli
from armd_jax.core import flops, sizes
from armd_jax.studies import costs
from armd_jax.studies.record import Done

pytestmark = pytest.mark.usefixtures("quick_compilation")

MEMBERS = 'chain(axis("model.width", [16, 32]), axis("training.num_steps", [16]))'


def _finish(plan, name: str, steps: int, seconds: float) -> None:
    """Makes it look as if the training of a member had taken so long."""
    run = plan.folder.member(name)
    run.mkdir(parents=True)
    rows = [("start", 0, 0.0), ("end", steps, seconds)]
    for event, step, spent in rows:
        row = {"event": event, "step": step, "time": 1e9 + spent, "began": 1e9, "seconds": {"training": spent}}
        files.append_json_line(run / "events.jsonl", row)
    plan.folder.note(name, Done("finished", ("train",)))


def test_parameters_and_flops_are_those_of_the_models(make_plan):
    """Parameters are those of an initialised model, and FLOPs those of all steps."""
    plan = make_plan(MEMBERS)
    listed, rate = costs.of(plan, plan.jobs, None)
    config = costs.assumed_vocabulary(plan.jobs[0].config).model
    lm = armd.LanguageModel.create(config, seed=0)
    padding = (sizes.padded_vocab(config) - config.vocab_size) * config.width
    assert listed[0].parameters == sum(leaf.size for leaf in jax.tree.leaves(lm.params)) - padding
    for job, cost in zip(plan.jobs, listed, strict=True):
        model = costs.assumed_vocabulary(job.config).model
        assert cost.tokens == cost.steps * 4 * 16
        assert cost.flops == pytest.approx(flops.training_flops_per_token(model).total * cost.tokens)
    assert listed[2].flops == 2 * listed[0].flops and listed[1].parameters > listed[0].parameters
    assert rate.flops_per_second is None and [cost.seconds for cost in listed] == [None] * 3
    text = costs.as_text(listed, rate)
    assert "3 members" in text and "no rate is known until a member is finished" in text


def test_the_rate_is_that_of_finished_members(make_plan):
    """FLOPs per second of what is trained; what is trained already takes no time, and what is begun less."""
    plan = make_plan(MEMBERS)
    _finish(plan, "model.width=16", 8, 4.0)
    begun = plan.folder.member("training.num_steps=16")
    begun.mkdir(parents=True)
    for step in (1, 2, 3, 4):
        files.append_json_line(begun / "metrics.jsonl", {"step": step})
    listed, rate = costs.of(plan, plan.jobs, None)
    assert rate.flops_per_second == pytest.approx(listed[0].flops / 4.0)
    assert rate.source == "measured on 1 finished member"
    assert listed[0].seconds == 0 and listed[2].seconds == pytest.approx(8.0 * 12 / 16)
    assert listed[1].seconds == pytest.approx(4.0 * listed[1].flops / listed[0].flops)
    assert [cost.state for cost in listed] == ["finished", "not begun", "step 4"]
    listed, rate = costs.of(plan, plan.jobs, 1e6)
    assert listed[1].seconds == pytest.approx(listed[1].flops / 1e6) and rate.source == "given by --rate"


def test_a_list_runs_nothing(tmp_path, capsys, sweep_file):
    """It prints a table or JSON, and leaves no folder."""
    command = ["sweep", f"--config={sweep_file(MEMBERS)}", f"--out={tmp_path / 'out'}", "--list"]
    assert cli.main(command) == 0
    assert (
        "model.width=32" in (one := capsys.readouterr().out) and "of training left if one member runs at a time" in one
    )
    assert cli.main([*command, "--rate=1e3", "--jobs=2"]) == 0
    *members, last = capsys.readouterr().out.splitlines()
    times = [line.split()[4].split(":") for line in members[1:]]
    left = [3600 * int(hours) + 60 * int(minutes) + int(seconds) for hours, minutes, seconds in times]
    together = max(sum(left) / 2, *left)
    assert f"{costs.duration(together)} of training left if 2 members run at a time, each at the rate" in last
    assert cli.main([*command, "--json", "--rate=1e9", "--only=model*"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["members"]] == ["model.width=16", "model.width=32"]
    assert found["rate"]["flops_per_second"] == 1e9 and found["members"][0]["state"] == "not begun"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0.0, "0:00:00"), (61.4, "0:01:01"), (3600 * 30 + 5, "30:00:05")]
)
def test_durations(seconds, text):
    assert costs.duration(seconds) == text
