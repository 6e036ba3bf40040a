"""The benchmarks of learning: what they compare is paired and of one size, and an interrupted table is continued."""

import dataclasses
import importlib
import json
import math
import pathlib
import sys

import numpy as np
import pytest

from armd_jax.config import Config
from armd_jax.core import parameters
from armd_jax.data.packing import PreparedData
from armd_jax.errors import UserError

FOLDER = pathlib.Path(__file__).parents[2] / "experiments/benchmarks"
TINY = (
    "model.width=16",
    "model.num_heads=2",
    "model.num_layers=2",
    "model.two_stream_layers=1",
    "model.max_length=32",
    "model.positional_width=8",
    "data.tokenizer=bytes",
    "training.batch_size=2",
)


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules `trainings`, `learning` and `ablations`, imported as their scripts import them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("trainings", "learning", "ablations")
    yield {name: importlib.import_module(name) for name in names}
    for name in (*names, "common", "torch_gpt2"):
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(benchmarks, corpus, tmp_path) -> tuple[Config, PreparedData]:
    """A tiny config of 8 steps, and its prepared data."""
    trainings = benchmarks["trainings"]
    values = trainings.scaled(trainings.quickstart(smoke=False), 8)
    config = trainings.with_overrides(values, [*TINY, f"data.path={corpus}"])
    data, config = trainings.prepare(config, tmp_path / "data", progress=False)
    return config, data


class _Recorder:
    """A learner that only notes what it is given; its held-out loss falls by 1 with every update."""

    num_parameters = 7

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []

    def update(self, tokens_BN: np.ndarray) -> None:
        self.batches.append(np.array(tokens_BN))

    def held_out(self) -> float:
        return 10.0 - len(self.batches)


def _training(benchmarks, **changes):
    trainings = benchmarks["trainings"]
    points = [(2, 1.0, 5.0), (4, 2.0, 4.0), (6, 3.0, 3.5), (8, 4.0, 3.0)]
    fields = {
        "setting": "s",
        "name": "a model",
        "learning_rate": 1e-3,
        "seed": 0,
        "steps": 8,
        "num_parameters": 7,
        "curve": tuple(trainings.Point(*point) for point in points),
        "tokens_per_second": 100.0,
        "batches": "b",
        "hardware": "h",
        "commit": "c",
    }
    return trainings.Training(**(fields | changes))


# --- what is compared -----------------------------------------------------------------------------------------------


def test_every_model_gets_the_same_batches(benchmarks, tiny):
    """Two learners with the same seed see byte-identical batches in the same order, and another seed sees others."""
    config, data = tiny
    trainings = benchmarks["trainings"]
    made: list[_Recorder] = []

    def make(one: Config) -> _Recorder:
        made.append(_Recorder())
        return made[-1]

    case = trainings.Case("recorder", config, "setting", make)
    found = [trainings.train(case, 1e-3, seed, data, 4, progress=False) for seed in (0, 0, 1)]
    assert all(len(learner.batches) == 8 for learner in made)
    assert all((a == b).all() for a, b in zip(made[0].batches, made[1].batches, strict=True))
    assert found[0].batches == found[1].batches != found[2].batches
    assert [(point.step, point.nats) for point in found[0].curve] == [(2, 8.0), (4, 6.0), (6, 4.0), (8, 2.0)]


def test_models_that_saw_other_batches_are_not_compared(benchmarks):
    """Digests of batches must agree seed by seed."""
    check = benchmarks["learning"].check_pairing
    ours, theirs = _training(benchmarks), _training(benchmarks, name="other", seed=1, batches="b1")
    assert check({"ar": [ours], "gpt2": [ours, theirs]}) == {0: "b", 1: "b1"}
    with pytest.raises(UserError, match="other, seed 1: it was trained on other batches"):
        check({"ar": [ours, dataclasses.replace(ours, seed=1)], "gpt2": [ours, theirs]})


@pytest.mark.parametrize("words", [[], ["model.norm=rmsnorm"], ["model.mlp=swiglu"], ["model.width=96"]])
def test_parameters_are_within_two_percent_of_gpt2s(benchmarks, words):
    """All three of our models are smaller than GPT-2 by 0 to 2%, through the width of their MLPs alone."""
    learning, trainings = benchmarks["learning"], benchmarks["trainings"]
    values = trainings.quickstart(smoke=False)
    for changes in learning.OURS.values():
        config = trainings.with_overrides(values, [*words, *changes, "model.vocab_size=2000"])
        fitted = learning.with_parameters_of_gpt2(config)
        assert 0.98 <= parameters.count(fitted.model) / learning.gpt2_parameters(config.model) <= 1
        assert dataclasses.replace(fitted.model, mlp_width=config.model.mlp_width) == config.model


def test_a_recipe_that_gpt2_does_not_follow_is_an_error(benchmarks):
    """What only our side could have is refused."""
    learning, trainings = benchmarks["learning"], benchmarks["trainings"]
    values = learning.base_values("cpu", smoke=False)
    learning.check_recipe(trainings.with_overrides(values, []))
    for word in ("model.dropout=0.1", "optimizer.kind=muon"):
        with pytest.raises(UserError, match=word):
            learning.check_recipe(trainings.with_overrides(values, [word]))


def test_phases_keep_their_share_of_the_steps(benchmarks):
    """Half the steps of the quickstart have half its warm-up and half of every phase."""
    trainings = benchmarks["trainings"]
    values = trainings.quickstart(smoke=False)
    half = trainings.scaled(values, values.training.num_steps // 2)
    for section, name in (("optimizer", "warmup_steps"), ("order", "ar_steps"), ("order", "sbp_steps")):
        assert half[section][name] == values[section][name] / 2


# --- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nats", "steps", "seconds"), [(4.5, 3, 1.5), (4.0, 4, 2.0), (3.25, 7, 3.5), (3.0, 8, 4.0), (6.0, 2, 1.0)]
)
def test_when_a_loss_was_reached(benchmarks, nats, steps, seconds):
    """Between two evaluations it is interpolated; before the first one, the first one counts."""
    assert benchmarks["trainings"].reached(_training(benchmarks), nats) == pytest.approx((steps, seconds))


def test_a_loss_that_was_never_reached(benchmarks):
    """None, and the table says of how many seeds."""
    assert benchmarks["trainings"].reached(_training(benchmarks), 2.9) is None
    text = benchmarks["learning"].arrival_text
    assert text([None, None]) == "not reached" and text([None, 100.0]) == "not reached by 1 of 2 seeds"
    assert text([100.0, 200.0]) == "150 ± 50" and text([]) == ""


def test_ratios_are_of_equal_seeds(benchmarks):
    """A ratio of perplexities compares trainings of one seed; a seed that one side lacks is left out."""
    point = benchmarks["trainings"].Point
    ours = [_training(benchmarks, seed=seed, curve=(point(8, 1.0, 3.0 + seed),)) for seed in (0, 1, 2)]
    theirs = [_training(benchmarks, seed=seed, curve=(point(8, 1.0, 3.1 + seed),)) for seed in (1, 0)]
    assert benchmarks["trainings"].perplexity_ratios(ours, theirs) == pytest.approx([math.exp(-0.1)] * 2)


def test_standard_error(benchmarks):
    """The standard deviation divided by the root of the number of seeds; none for a single seed."""
    trainings = benchmarks["trainings"]
    assert trainings.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 3**-0.5))
    assert trainings.shown([1.0]) == "1.000" and trainings.shown([1.0, math.inf]) == "diverged"


# --- continuing -----------------------------------------------------------------------------------------------------


def test_an_interrupted_table_is_continued(benchmarks, tiny, tmp_path):
    """Finished trainings are read from the file, a line that a kill cut short is not, and the rest is trained."""
    config, data = tiny
    trainings = benchmarks["trainings"]
    made: list[float] = []

    def make(one: Config) -> _Recorder:
        made.append(one.optimizer.learning_rate)
        return _Recorder()

    case = trainings.Case("recorder", config, "setting", make)
    file = tmp_path / "results.jsonl"
    trainings.complete(trainings.Results(file), case, (1e-3, 2e-3), (0,), data, 4, progress=False)
    assert made == [1e-3, 2e-3]
    file.write_text(file.read_text() + '{"setting": "sett')
    results = trainings.Results(file)
    trainings.complete(results, case, (1e-3, 2e-3, 4e-3), (0, 1), data, 4, progress=False)
    assert made[2:] == [4e-3, 1e-3]  # the new rate, then the new seed at the best rate (all are equal: the first)
    assert len(results.trainings) == 4 and trainings.Results(file).trainings == results.trainings


def test_a_diverged_training_is_kept_and_never_the_best(benchmarks, tmp_path):
    """JSON has no NaN: the loss is null in the file and infinite in comparisons."""
    trainings = benchmarks["trainings"]
    bad = _training(benchmarks, learning_rate=1.0, curve=(trainings.Point(8, 1.0, None),))
    results = trainings.Results(tmp_path / "results.jsonl")
    results.add(bad)
    results.add(_training(benchmarks))
    case = trainings.Case("a model", Config(), "s", lambda config: _Recorder())
    assert trainings.Results(tmp_path / "results.jsonl").trainings[0].final == math.inf
    assert results.best_rate(case, 0) == 1e-3


def test_the_best_rate_at_an_edge_is_noted(benchmarks):
    """A best rate with no worse one on both sides may not be the best one there is."""
    trainings = benchmarks["trainings"]
    assert trainings.at_an_edge([1e-3, 2e-3, 4e-3], 4e-3) and not trainings.at_an_edge([1e-3, 2e-3, 4e-3], 2e-3)


def test_settings_differ_if_anything_but_rate_and_seed_does(benchmarks, tiny):
    """What decides a result is in the digest; GPT-2's does not depend on what only our models have."""
    config, data = tiny
    trainings, learning = benchmarks["trainings"], benchmarks["learning"]

    def ours(*words: str) -> str:
        return trainings.our_case("", trainings.with_overrides(trainings.as_config_dict(config), words), data).setting

    def theirs(*words: str) -> dict:
        return learning.gpt2_facts(trainings.with_overrides(trainings.as_config_dict(config), words))

    same = ("optimizer.learning_rate=1", "training.seed=5")
    assert ours(*same) == ours() and theirs(*same) == theirs()
    assert ours("model.norm=rmsnorm") != ours() and theirs("model.norm=rmsnorm") == theirs()
    assert ours("optimizer.beta2=0.5") != ours() and theirs("optimizer.beta2=0.5") != theirs()


@pytest.mark.slow
def test_bits_under_orders_are_those_of_the_evaluation(benchmarks, tiny):
    """Left to right they are the held-out loss in bits; every order that fits the length has a figure of its own."""
    config, data = tiny
    learner = benchmarks["trainings"].OurLearner(config, data)
    bits = learner.bits_under_orders(data, "valid", (2, 5))
    counts = data.counts("valid")
    expected = learner.held_out() * counts.tokens / math.log(2) / counts.bytes
    assert list(bits) == ["left to right", "S = 2", "random"] and len(set(bits.values())) == 3
    assert bits["left to right"] == pytest.approx(expected, rel=1e-5)


# --- ablations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parametrisation", "aggregator", "optimizer", "width"])
def test_every_row_of_a_table_is_a_config(benchmarks, name):
    """The fields that a table changes exist and take its values."""
    ablations = benchmarks["ablations"]
    table = ablations.TABLES[name]
    rows = ablations.rows_of(table, [], smoke=False, steps=table.steps)
    assert list(rows) == [arm.name for arm in table.arms]
    assert all(list(by_variant) == [variant.name for variant in table.variants] for by_variant in rows.values())


def test_a_row_keeps_what_makes_it(benchmarks):
    """Changes of the command line apply to every row, except for the fields that the row or its arm is about."""
    ablations = benchmarks["ablations"]
    words = ["model.aggregator=mean", "model.num_layers=3", "model.width=64"]
    rows = ablations.rows_of(ablations.TABLES["width"], words, smoke=False, steps=200)
    for arm, aggregator in (("AR", "shift"), ("ARMD, identity order", "mean")):
        model = rows[arm]["width 256"].model
        assert (model.aggregator, model.num_layers, model.width) == (aggregator, 3, 256)


def test_equal_time_means_steps_in_proportion_to_speed(benchmarks, tiny):
    """A variant that is half as fast gets half the steps, at its own best rate, and warm-up keeps its share."""
    config, data = tiny
    trainings, ablations = benchmarks["trainings"], benchmarks["ablations"]
    cases = [trainings.our_case(name, config, data) for name in ("first", "second")]
    cases[1] = dataclasses.replace(cases[1], setting="other")
    results = trainings.Results(None)
    assert ablations.equal_time_cases(cases, results, data, (0,)) == []
    results.add(_training(benchmarks, setting=cases[0].setting, tokens_per_second=100.0))
    results.add(_training(benchmarks, setting="other", tokens_per_second=50.0, learning_rate=2e-3))
    ((case, rate),) = ablations.equal_time_cases(cases, results, data, (0,))
    assert case.config.training.num_steps == 4 and rate == 2e-3
    assert case.name == "second, 4 steps in the time of first"


@pytest.mark.parametrize(
    ("script", "words", "text"),
    [
        ("learning", ["--config.model.widht=8"], "unknown field 'model.widht'"),
        ("learning", ["--only=gpt3"], "--only=gpt3: not known"),
        ("learning", ["--only=ar", "--rates=0"], "--rates: must be"),
        ("learning", ["--only=ar", "--steps=2"], "--steps=2: must be at least 4"),
        ("learning", ["--only=ar", "--unheard"], "unknown argument '--unheard'"),
        ("ablations", ["width", "--config.model.widht=8"], "unknown field 'model.widht'"),
        ("ablations", ["width", "--only=height"], "--only=height: not known"),
    ],
)
def test_mistakes_are_one_line(benchmarks, monkeypatch, capsys, script, words, text):
    """A wrong flag or field ends with code 2 and one line."""
    monkeypatch.setattr(benchmarks["learning"], "has_hugging_face", lambda: True)
    monkeypatch.setattr(sys, "argv", [script, *words])
    assert benchmarks[script].main() == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and text in message and message.count("\n") == 1


def test_without_torch_one_line_says_how_to_install_it(benchmarks, monkeypatch, capsys):
    """The message names the pip command, and the exit code is 2."""
    monkeypatch.setattr(benchmarks["learning"], "has_hugging_face", lambda: False)
    monkeypatch.setattr(sys, "argv", ["learning.py", "--smoke"])
    assert benchmarks["learning"].main() == 2
    message = capsys.readouterr().err
    assert 'pip install -e ".[benchmark]"' in message and message.count("\n") == 1


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_our_models_learn_without_torch(run_benchmark, tmp_path, corpus):
    """`--only` leaves GPT-2 and torch out; a second call finds everything finished and prints the same figures."""
    flags = ["--smoke", "--only=ar", "--steps=4", "--json", f"--resume-file={tmp_path / 'done.jsonl'}"]
    flags += [f"--data-dir={tmp_path / 'data'}", f"--config.data.path={corpus}"]
    first, again = (run_benchmark("learning.py", *flags) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    models = json.loads(first.stdout)["models"]
    assert list(models) == ["ar"] and models == json.loads(again.stdout)["models"]
    assert models["ar"]["nats"]["100%"][0] < models["ar"]["nats"]["25%"][0]


def test_gpt2_predicts_every_token_of_a_row_from_those_before(benchmarks, tiny):
    """It has as many parameters as computed for it, and a changed token changes its own loss and later ones alone."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    config, data = tiny
    learner = importlib.import_module("torch_gpt2").Gpt2Learner(config, data)
    assert learner.num_parameters == benchmarks["learning"].gpt2_parameters(config.model)
    tokens = torch.arange(32)[None] % 7
    changed = tokens.clone()
    changed[0, 20] = 50
    before, after = (learner._nats(learner._model, rows).detach() for rows in (tokens, changed))
    assert before.shape == (32,) and torch.equal(before[:20], after[:20])
    assert (before[20:] != after[20:]).all()
    first = learner.held_out()
    assert first == pytest.approx(math.log(config.model.vocab_size), rel=0.05)
    for _ in range(3):
        learner.update(tokens.numpy())
    assert learner.held_out() != first


@pytest.mark.slow
def test_smoke_with_gpt2(run_benchmark, tmp_path, corpus):
    """All four models are trained and compared."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    flags = ["--smoke", f"--data-dir={tmp_path / 'data'}", f"--config.data.path={corpus}"]
    found = run_benchmark("learning.py", *flags, "--json")
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    models = result["models"]
    assert list(models) == ["gpt2", "ar", "armd", "curriculum", "mdlm"] and list(result["batches"]) == ["0"]
    assert models["gpt2"]["perplexity_to_gpt2"] == [1.0]
    for model in models.values():
        assert 0.98 <= model["parameters"] / models["gpt2"]["parameters"] <= 1
        assert model["nats"]["100%"][0] < model["nats"]["25%"][0]


@pytest.mark.slow
def test_an_ablation_prints_its_table(run_benchmark, tmp_path, corpus):
    """The smoke form of a table ends with Markdown, seeds, hardware and command."""
    flags = ["--smoke", "--steps=4", f"--data-dir={tmp_path / 'data'}", f"--config.data.path={corpus}"]
    found = run_benchmark("ablations.py", "width", *flags)
    assert found.returncode == 0, found.stderr
    for text in ("| width 128 |", "| width 256 |", "Seeds: 0.", "Hardware: ", "Command: `python ", "**ARMD"):
        assert text in found.stdout
