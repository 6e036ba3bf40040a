"""Sweep files: products, pairs and chains of members, their names, and mistakes in one line."""

import pathlib
import textwrap

import pytest
from ml_collections import ConfigDict, config_dict

from armd_jax import config as configs
from armd_jax import experiment_file, sweeps
from armd_jax.errors import UserError
from armd_jax.studies import plan as plans
from armd_jax.sweeps import Sweep, axis, chain, choices, configs_of, product, seeds, then, zip_

WIDTHS = axis("model.width", [24, 48])


def _names(members: sweeps.Members) -> list[str]:
    return [member.name for member in members]


def _set(members: sweeps.Members) -> list[tuple]:
    return [tuple(member.overrides.values()) for member in members]


def _configs(members: sweeps.Members) -> dict[str, configs.Config]:
    return sweeps.configs_of(Sweep(configs.default_config_dict(), members), lambda member, text: text)


def test_a_product_has_every_combination():
    """The last axis varies fastest, and the fields and the names are those of all axes."""
    members = product(WIDTHS, axis("model.dropout", [0.0, 0.1, 0.2]), seeds([3, 5]))
    wanted = [(width, dropout, seed) for width in (24, 48) for dropout in (0.0, 0.1, 0.2) for seed in (3, 5)]
    assert _set(members) == wanted and len(set(_names(members))) == 12
    assert members[3].name == "model.width=24,model.dropout=0.1,seed=5"
    assert members[3].row == members[2].row == "model.width=24,model.dropout=0.1" and members[3].seed == 5
    assert dict(members[3].values) == {"model.width": 24, "model.dropout": 0.1, "seed": 5}
    assert members[3].overrides["training.seed"] == 5
    built = _configs(members)[members[3].name]
    assert (built.model.width, built.model.dropout, built.training.seed) == (24, 0.1, 5)


def test_pairs_and_chains():
    """zip_ takes one of each, chain one after the other, and both may stand inside a product."""
    pairs = zip_(WIDTHS, axis("model.num_heads", [2, 4]))
    assert _set(pairs) == [(24, 2), (48, 4)]
    both = chain(pairs, axis("model.dropout", [0.1]))
    assert _names(both) == ["model.width=24,model.num_heads=2", "model.width=48,model.num_heads=4", "model.dropout=0.1"]
    assert _set(product(both, seeds(2))) == [(24, 2, 0), (24, 2, 1), (48, 4, 0), (48, 4, 1), (0.1, 0), (0.1, 1)]
    assert sweeps.axes_of(product(seeds(2), both)) == ("model.width", "model.num_heads", "model.dropout")


def test_choices_are_sets_with_labels():
    """What stands in tables and names is the label."""
    left_to_right = {"model.aggregator": "shift", "model.two_stream_layers": 0, "order.kind": "left_to_right"}
    members = product(choices("model", {"AR": left_to_right, "ARMD": {}}), seeds(1))
    assert _names(members) == ["model=AR,seed=0", "model=ARMD,seed=0"]
    assert members[0].values["model"] == "AR" and members[0].row == "model=AR"
    built = _configs(members)
    assert built["model=AR,seed=0"].model.aggregator == "shift"
    shared = configs.Config(data=configs.DataConfig(cache_dir="{sweep}/data"))
    assert built["model=ARMD,seed=0"] == shared


@pytest.mark.parametrize(
    ("value", "label"), [(8, "8"), (0.25, "0.25"), (1e-5, "1e-05"), (True, "true"), ((1, 2), "1+2"), ("a_b", "a_b")]
)
def test_values_in_names(value, label):
    assert axis("model.width", [value])[0].name == f"model.width={label}"


def test_commands_of_some_members():
    """They follow those that members have already, also through a product."""
    members = product(then(WIDTHS, "report"), then(seeds(1), "checkpoints", "eval"))
    assert [member.after for member in members] == [("report", "checkpoints", "eval")] * 2


def test_members_that_are_chosen():
    """Lists of members serve where tuples do, so that combinations can be left out."""
    chosen = [
        member for member in product(WIDTHS, seeds(2)) if member.overrides["model.width"] == 24 or not member.seed
    ]
    both = chain(then(chosen, "report"), [])
    sweep = Sweep(configs.default_config_dict(), list(both))
    assert _set(sweep.members) == [(24, 0), (24, 1), (48, 0)] and sweep.members == both


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: axis("model.width", []), "'model.width' has no values"),
        (lambda: axis("model.width", 3), "3 is not a list of values"),
        (lambda: axis("model.norm", "rmsnorm"), "'rmsnorm' is not a list of values"),
        (lambda: axis("data.path", ["a/b"]), r"'a/b' cannot be part of a folder's name .* choices\('data.path'"),
        (lambda: axis("data.path", [""]), "'' cannot be part of a folder's name"),
        (lambda: axis("a b", [1]), "'a b': a name must be"),
        (lambda: choices("seed", {"a": {}}), "the axis 'seed': a report has a column"),
        (lambda: axis("row", [1]), "the axis 'row': a report has a column"),
        (lambda: choices("baseline", {"a": {}}), "the axis 'baseline': a report has a column"),
        (lambda: choices("model", {}), "expected labels with their overrides"),
        (lambda: choices("model", {"AR": 3}), "'AR': expected a label and its overrides"),
        (lambda: choices("model", {"A/R": {}}), "'A/R' cannot be part"),
        (lambda: seeds([0.5]), "0.5 is not a whole number"),
        (lambda: seeds(0), "'seed' has no values"),
        (lambda: product(), "product: no members were given"),
        (lambda: product([1, 2]), r"product: \[1, 2\] is not made by axis"),
        (lambda: product(WIDTHS, WIDTHS), "the axis 'model.width' is used twice"),
        (lambda: product(WIDTHS, choices("size", {"S": {"model.width": 16}})), "'model.width' is set by two axes"),
        (lambda: zip_(WIDTHS, seeds(3)), "zip_: its axes have 2 and 3 values"),
        (lambda: _configs(chain(WIDTHS, WIDTHS)), "two members have the same name"),
        (lambda: _configs(chain(choices("m", {"a": {}}), choices("m", {"A": {"model.width": 24}}))), "the same name"),
        (lambda: _configs(choices("m", {"a": {}, "b": {"model.dropout": 0.0}})), "'m=a' and 'm=b': .* the same config"),
        (lambda: _configs(axis("order.rho", [8])), r"member order.rho=8: unknown field 'order.rho'"),
        (lambda: _configs(axis("orders.kind", ["uniform"])), "unknown field 'orders.kind'; did you mean 'order'"),
        (lambda: _configs(axis("model", [3])), "'model' is not the name of a field"),
        (lambda: _configs(axis("model.width", [33])), "member model.width=33: model.width=33 is not divisible"),
        (lambda: _configs(axis("model.width", [0.5])), "member model.width=0.5: .* expected int"),
        (lambda: _configs(()), "the sweep has no members"),
        (lambda: Sweep({}, WIDTHS), r"Sweep: base=\{\}: must be an ml_collections.ConfigDict"),
        (lambda: _of_base(ConfigDict({"data": 3})), "data.*3"),
        (
            lambda: _of_base(ConfigDict({"data": config_dict.required_placeholder(str)})),
            "Sweep: base: a value that it requires is not set",
        ),
        (lambda: Sweep(configs.default_config_dict(), [1]), r"Sweep: \[1\] is not made by axis"),
        (lambda: Sweep(configs.default_config_dict(), WIDTHS, "eval"), "Sweep: after='eval': expected commands"),
        (lambda: then(WIDTHS, 3), r"then=\(3,\): expected commands"),
        (lambda: then([1], "eval"), r"then: \[1\] is not made by axis"),
        (lambda: _configs(choices("m", {"x" * 300: {}})), "must have 1 to 200 characters"),
    ],
)
def test_mistakes_are_one_line(make, reason):
    with pytest.raises(UserError, match=reason) as error:
        make()
    assert "\n" not in str(error.value)


def test_configs_are_those_of_the_base_and_the_members(tmp_path):
    """`--config.…` words change the base, but no field that members set; a sweep may import from the folder above."""
    (tmp_path / "base_of_sweep.py").write_text(
        "from armd_jax.config import default_config_dict\n"
        "def get_config(arg):\n    c = default_config_dict()\n    c.model.num_layers = int(arg)\n    return c\n"
    )
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "sweep.py"
    file.write_text(
        textwrap.dedent("""
        from base_of_sweep import get_config
        from armd_jax.sweeps import Sweep, axis

        def get_sweep(arg):
            return Sweep(get_config(arg), axis("order.max_permuted", [32, 64]))
        """)
    )
    sweep = plans.load(f"{file}:8", ["--config.model.dropout=0.5"])
    built = sweeps.configs_of(sweep, lambda member, text: text)
    found = [(one.model.num_layers, one.model.dropout, one.order.max_permuted) for one in built.values()]
    assert found == [(8, 0.5, 32), (8, 0.5, 64)]
    with pytest.raises(UserError, match="the members of the sweep set order.max_permuted themselves"):
        plans.load(f"{file}:8", ["--config.order.max_permuted=3"])
    with pytest.raises(UserError, match="the file defines no get_sweep"):
        plans.load(str(tmp_path / "base_of_sweep.py"), [])
    file.write_text("def get_sweep(arg=''):\n    return {}\n")
    with pytest.raises(UserError, match=r"get_sweep must return an armd_jax\.sweeps\.Sweep"):
        plans.load(str(file), [])


def test_a_stored_config_is_an_experiment(tmp_path):
    """`--config=config.json` is the config that a run was trained with, to the last field, and takes overrides."""
    values = configs.default_config_dict()
    values.order.update(mix=("uniform:0.25",), streams=(1, 2, 8))
    values.data.mixture = ("a:0.5", "b:0.5")
    config = configs.from_config_dict(values)
    path = tmp_path / "12:30" / "config.json"
    path.parent.mkdir()
    path.write_text(configs.to_json(config))
    loaded = experiment_file.load_config_file(str(path))
    assert configs.from_config_dict(loaded) == config
    experiment_file.apply_overrides(loaded, ["--config.order.mix=contiguous:0.1", "--config.order.streams=4"])
    assert configs.from_config_dict(loaded).order.mix == ("contiguous:0.1",)
    for text, reason in (("{", "cannot be read as JSON"), ("[]", "expected a section"), ('{"modle": {}}', "'modle'")):
        path.write_text(text)
        with pytest.raises(UserError, match=reason) as error:
            experiment_file.load_config_file(str(path))
        assert str(error.value).startswith(f"--config={path}: ")
    with pytest.raises(UserError, match="there is no file"):
        experiment_file.load_config_file(str(tmp_path / "none.json"))


def test_sweeps_of_the_repository():
    """Every file of experiments/sweeps builds, whole and in its smoke form, and is documented."""
    folder = pathlib.Path(__file__).resolve().parent.parent / "experiments" / "sweeps"
    for file in sorted(folder.glob("*.py")):
        text = file.read_text()
        assert "Command:" in text and "Hardware:" in text and f"experiments/sweeps/{file.name}" in text
        for arg in ("", ":smoke"):
            assert len(sweeps.configs_of(plans.load(f"{file}{arg}", []), lambda member, filled: filled)) > 1
        with pytest.raises(UserError, match="smokee"):
            plans.load(f"{file}:smokee", [])


@pytest.mark.parametrize("base", [ConfigDict(), config_dict.FrozenConfigDict(configs.default_config_dict().to_dict())])
def test_the_base_is_only_read(base):
    """It may lack sections and be frozen; the rows of tokens are in the sweep's folder all the same."""
    before = base.to_dict()
    (config,) = _of_base(base).values()
    assert config.data.cache_dir == "{sweep}/data" and base.to_dict() == before


def _of_base(base):
    return configs_of(Sweep(base, seeds(1)), lambda member, text: text)
