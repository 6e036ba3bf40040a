"""What is to be done: names that are waited for, members that are chosen, and folders that do not fit."""

import dataclasses
import json

import pytest

from armd_jax import config as configs
from armd_jax.errors import UserError
from armd_jax.studies.record import Done

AR = 'choices("model", {"AR": {}, "WIDE": {"model.width": 32}})'


def _begin(plan, name: str) -> None:
    """Makes it look as if the training of a member had saved something."""
    (plan.folder.member(name) / "checkpoints" / "2").mkdir(parents=True)


def test_the_record_is_what_a_report_reads(make_plan):
    """sweep.json names the members with their rows, values, seeds and overrides; the folder knows their configs."""
    plan = make_plan(f"product({AR}, seeds(2))", '("eval --draws=0",)')
    plan.folder.path.mkdir()
    plan.write()
    record = json.loads((plan.folder.path / "sweep.json").read_text())
    assert record["config"] == plan.spec and record["axes"] == ["model"] and len(record["members"]) == 4
    assert record["members"][3] == {
        "name": "model=WIDE,seed=1",
        "row": "model=WIDE",
        "values": {"model": "WIDE"},
        "seed": 1,
        "overrides": {"model.width": 32, "training.seed": 1},
        "after": ["eval --draws=0"],
    }
    config = plan.folder.config("model=WIDE,seed=1")
    assert config == plan.jobs[3].config and (config.model.width, config.training.seed) == (32, 1)
    assert config.data.cache_dir == str(plan.folder.path / "data")  # the same rows serve all members
    assert plan.folder.names() == [job.name for job in plan.jobs]


def test_commands_get_the_folders(make_plan):
    """`--run` is the member's folder, and `{sweep}` the whole sweep's; who is named is waited for."""
    judged = f'then({AR}, "eval --judge={{sweep}}/members/model=WIDE")'
    plan = make_plan(judged, '("eval --streams=2 --draws=0",)')
    first, second = plan.jobs[0].after
    assert first.words == ("eval", "--streams=2", "--draws=0", f"--run={plan.folder.member('model=AR')}")
    assert first.needs == () and second.needs == ("model=WIDE",)
    assert second.words[1] == f"--judge={plan.folder.member('model=WIDE')}"


def test_a_training_may_start_from_another(make_plan):
    """`training.init_from` may name a member that stands before."""
    tuned = 'choices("tuned", {"yes": {"training.init_from": "{sweep}/members/model=AR"}})'
    plan = make_plan(f"chain({AR}, {tuned})")
    assert plan.jobs[2].needs == ("model=AR",)
    assert plan.jobs[2].config.training.init_from == str(plan.folder.member("model=AR"))
    with pytest.raises(UserError, match="'model=AR', which must stand before it"):
        make_plan(f"chain({tuned}, {AR})")


def test_members_are_chosen(make_plan):
    """By a pattern for the name or the row."""
    plan = make_plan(f"product({AR}, seeds(2))")
    assert [job.name for job in plan.chosen("*seed=1")] == ["model=AR,seed=1", "model=WIDE,seed=1"]
    assert [job.name for job in plan.chosen("model=AR")] == ["model=AR,seed=0", "model=AR,seed=1"]
    assert plan.chosen(None) == plan.jobs
    with pytest.raises(UserError, match="--only=model=ARX: no member; did you mean 'model=AR"):
        plan.chosen("model=ARX")


@pytest.mark.parametrize(
    ("members", "after", "reason"),
    [
        (AR, '("eval --judge={sweep}/members/model=A",)', "the sweep has no member 'model=A'; did you mean 'model=AR'"),
        (AR, '("eval \'",)', "No closing quotation"),
        (AR, '("eval", "eval")', "the command 'eval' is named twice"),
        ('choices("m", {"a": {"training.init_from": "{sweep}/members/m=b"}})', "()", "no member 'm=b'"),
    ],
)
def test_mistakes_are_one_line(make_plan, members, after, reason):
    with pytest.raises(UserError, match=reason) as error:
        make_plan(members, after)
    assert "\n" not in str(error.value)


def test_a_member_that_has_changed_is_refused(make_plan):
    """Finished members keep their whole config; those under way, what a run may not change; the others nothing."""
    plan = make_plan(AR)
    plan.folder.path.mkdir()
    plan.write()
    assert make_plan(AR, overrides=("--config.training.batch_size=8",))  # nothing has begun
    _begin(plan, "model=AR")
    assert make_plan(AR, overrides=("--config.training.num_steps=10",))  # a run may go on for longer
    with pytest.raises(UserError, match="member model=AR: it is trained with .*training.batch_size was 4, now 8"):
        make_plan(AR, overrides=("--config.training.batch_size=8",))
    plan.folder.note("model=AR", Done("finished", ("train",)))
    with pytest.raises(UserError, match="member model=AR: it was trained with .*training.num_steps was 8, now 10"):
        make_plan(AR, overrides=("--config.training.num_steps=10",))
    (plan.folder.member("model=AR") / "checkpoints" / "2").rmdir()  # whoever needs space keeps the results
    with pytest.raises(UserError, match="training.num_steps was 8, now 10"):
        make_plan(AR, overrides=("--config.training.num_steps=10",))
    more = make_plan(f'chain({AR}, axis("model.dropout", [0.1]))')  # new members may come
    assert [job.name for job in more.jobs] == ["model=AR", "model=WIDE", "model.dropout=0.1"]


def test_a_folder_that_changes_after_the_plan_is_refused(make_plan):
    """Whether it fits is looked at once more with the lock held: another sweep may have run in between."""
    plan = make_plan(AR)
    other = make_plan(AR, overrides=("--config.training.batch_size=8",))
    plan.folder.path.mkdir()
    plan.write()
    _begin(plan, "model=AR")
    with pytest.raises(UserError, match="training.batch_size was 4, now 8"):
        other.write()
    assert plan.folder.config("model=AR") == plan.jobs[0].config


def test_a_run_says_itself_what_it_was_begun_with(make_plan):
    """A job of a launcher that read an older config has not trained the newer one, whatever configs/ says by then."""
    plan = make_plan(AR)
    plan.folder.path.mkdir()
    plan.write()
    run = plan.folder.member("model=AR")
    run.mkdir()
    begun = plan.jobs[0].config
    filled = dataclasses.replace(begun, model=dataclasses.replace(begun.model, vocab_size=257))  # by the training
    (run / "config.json").write_text(configs.to_json(filled))
    assert plan.folder.config("model=AR") == begun
    newer = make_plan(AR, overrides=("--config.training.batch_size=8",))  # nothing is saved yet
    newer.write()
    _begin(plan, "model=AR")
    with pytest.raises(UserError, match="training.batch_size was 4, now 8"):
        make_plan(AR, overrides=("--config.training.batch_size=8",))
    assert make_plan(AR)


def test_a_folder_of_something_else_is_refused(make_plan):
    """Other files, other sweeps and runs that no sweep began are not taken over; a moved sweep is."""
    folder = make_plan(AR).folder
    folder.path.mkdir()
    (folder.path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds other files and no sweep"):
        make_plan(AR)
    (folder.path / "notes.txt").unlink()
    plan = make_plan(AR)
    plan.write()
    _begin(plan, "model=AR")
    with pytest.raises(UserError, match="holds another sweep, without any of these members"):
        make_plan('axis("model.width", [32])')
    before = plan.folder.config_file("model=AR").read_text()
    plan.folder.path.rename(plan.folder.path.parent / "moved")
    moved = make_plan(AR, out="moved")
    assert str(moved.folder.path / "data") not in before
    moved.write()
    assert str(moved.folder.path / "data") in moved.folder.config_file("model=AR").read_text()
    moved.folder.path.rename(plan.folder.path)
    plan.folder.config_file("model=AR").unlink()
    with pytest.raises(UserError, match="holds a run that no sweep began"):
        make_plan(AR)


def test_finished_trainings_are_known(make_plan):
    """A run that ended at its last step is trained, whoever ran it; one that was stopped or is too short is not."""
    plan = make_plan(AR)
    run = plan.folder.member("model=AR")
    run.mkdir(parents=True)
    for rows, trained in (
        (['{"event": "start", "step": 0}', '{"event": "end", "step": 8}'], True),
        (['{"event": "start", "step": 0}', '{"event": "end", "step": 7}'], False),
        (['{"event": "start", "step": 0}', '{"event": "stop", "step": 8}'], False),
        (['{"event": "end", "step": 8}', '{"event": "resume", "step": 8}'], False),
        (['{"event": "end", "step": 8}', '{"event": "save", "step": 8}'], True),
        ([], False),
    ):
        (run / "events.jsonl").write_text("".join(row + "\n" for row in rows))
        assert plan.folder.trained("model=AR", plan.jobs[0].config) is trained
    longer = configs.from_config_dict({"training": {"num_steps": 400_000}})
    plan.folder.note("model=AR", Done("failed", ("train",), "eval: failed"))
    assert plan.folder.trained("model=AR", longer)
