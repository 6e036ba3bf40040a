"""Experiment files and command-line overrides: the right value of the right type, or one clear line."""

import pathlib
import sys
import textwrap

import ml_collections
import pytest

from armd_jax import config as config_lib
from armd_jax import experiment_file
from armd_jax.config import Config
from armd_jax.errors import UserError


def _message(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# --- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model.width", "512", 512),
        ("model.dropout", "0.25", 0.25),
        ("model.dropout", "1e-1", 0.1),
        ("optimizer.clip_norm", "2", 2.0),
        ("model.tie_embeddings", "false", False),
        ("model.tie_embeddings", "True", True),
        ("model.tie_embeddings", "0", False),
        ("data.path", "text/*.txt", "text/*.txt"),
        ("data.path", "", ""),
        ("data.path", "a=b", "a=b"),
        ("data.tokenizer", "123", "123"),
        ("order.streams", "8", (8,)),
        ("order.streams", "1,2,4", (1, 2, 4)),
        ("order.streams", "(1, 2)", (1, 2)),
        ("order.streams", "[2]", (2,)),
        ("order.mix", "contiguous:0.25", ("contiguous:0.25",)),
        ("order.mix", "contiguous:0.25, uniform:0.1", ("contiguous:0.25", "uniform:0.1")),
        ("order.mix", "('contiguous:0.25',)", ("contiguous:0.25",)),
        ("order.mix", "()", ()),
        ("order.mix", "", ()),
        ("data.mixture", "gs://b/wiki:0.7,/p/code:0.3", ("gs://b/wiki:0.7", "/p/code:0.3")),
        ("mesh.fsdp", "-1", -1),
    ],
)
def test_overrides_in_both_forms(name, text, value):
    """`--config.a.b=v` and `--config.a.b v` set the field with its type."""
    for words in ([f"--config.{name}={text}"], [f"--config.{name}", text]):
        values = config_lib.default_config_dict()
        experiment_file.apply_overrides(values, words)
        section, field = name.split(".")
        assert values[section][field] == value and type(values[section][field]) is type(value)


def test_overrides_apply_in_order_and_build():
    """Several overrides, in mixed forms; the last one wins, and the result builds."""
    values = config_lib.default_config_dict()
    words = ["--config.model.width=64", "--config.model.num_heads", "4", "--config.model.width=128"]
    experiment_file.apply_overrides(values, words)
    built = config_lib.from_config_dict(values)
    assert (built.model.width, built.model.num_heads) == (128, 4) and built.order == Config().order


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--width=3"], r"unknown argument '--width=3'"),
        (["model.width=3"], r"unknown argument"),
        (["--config.model.width"], r"has no value"),
        (["--config.model.widht=3"], r"unknown field 'model\.widht'; did you mean 'model\.width'"),
        (["--config.modle.width=3"], r"unknown field 'modle\.width'; did you mean 'model'"),
        (["--config.model.width.x=3"], r"'model\.width' is a single value"),
        (["--config.model=3"], r"a section; set one of its fields"),
        (["--config.model.width=wide"], r"model\.width='wide': expected int \(default 768\)"),
        (["--config.model.width=1.5"], r"expected int"),
        (["--config.model.width=True"], r"expected int"),
        (["--config.model.width="], r"expected int"),
        (["--config.model.dropout=none"], r"model\.dropout='none': expected float"),
        (["--config.model.tie_embeddings=maybe"], r"expected true or false"),
        (["--config.order.streams=a,b"], r"expected whole numbers"),
        (["--config.order.streams=1.5,2"], r"expected whole numbers"),
        (["--config.order.streams=True,2"], r"expected whole numbers"),
    ],
)
def test_wrong_overrides(words, message):
    """A wrong override is an error of one line and leaves the config as it was."""
    values = config_lib.default_config_dict()
    with pytest.raises(UserError, match=message) as error:
        experiment_file.apply_overrides(values, words)
    _message(error)
    assert values.to_dict() == config_lib.default_config_dict().to_dict()


# --- experiment files -----------------------------------------------------------------------------------------------


def _file(folder: pathlib.Path, text: str) -> str:
    file = folder / "experiment.py"
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    return str(file)


def test_load_config_file(tmp_path):
    """`file.py` calls get_config(), `file.py:arg` get_config(arg)."""
    path = _file(
        tmp_path,
        """
        from armd_jax.config import default_config_dict

        def get_config(arg="full"):
            config = default_config_dict()
            config.data.path = arg
            return config
        """,
    )
    for spec, expected in ((path, "full"), (f"{path}:smoke", "smoke"), (f"{path}:", "")):
        loaded = experiment_file.load_config_file(spec)
        assert isinstance(loaded, ml_collections.ConfigDict)
        assert config_lib.from_config_dict(loaded).data.path == expected


def test_misspelt_field_in_a_config_file(tmp_path):
    """A field that a file sets and nobody knows is found at the latest when the config is built."""
    text = """
        from armd_jax.config import default_config_dict

        def get_config():
            config = default_config_dict()
            config.model.widht = 3
            return config
        """
    with pytest.raises(UserError, match="widht"):
        config_lib.from_config_dict(experiment_file.load_config_file(_file(tmp_path, text)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", r"the file fails with SyntaxError"),
        ("import no_such_module_at_all", r"the file fails with ModuleNotFoundError"),
        ("x = 3", r"defines no get_config"),
        ("def get_config(arg=''):\n    return {}", r"must return an ml_collections\.ConfigDict"),
        ("def get_config(arg=''):\n    raise KeyError(arg)", r"get_config fails with KeyError"),
        ("def get_config():\n    return None", r"must return|get_config fails with TypeError"),
        (
            "from armd_jax.config import UserError\ndef get_config(arg=''):\n    raise UserError('no such size')",
            r"^no such size$",
        ),
    ],
)
def test_wrong_config_files(tmp_path, text, message):
    """Whatever is wrong with a user's file is a UserError that says where and what, not a traceback of ours."""
    with pytest.raises(UserError, match=message):
        experiment_file.load_config_file(_file(tmp_path, text) + ":smoke")


def test_missing_config_file(tmp_path):
    """No file, a folder and a file that is not Python are errors with their path."""
    note = tmp_path / "note.txt"
    note.write_text("get_config = 3", encoding="utf-8")
    for spec, message in (
        (f"{tmp_path}/none.py", "there is no file"),
        (f"{tmp_path}", "there is no file"),
        (f"{note}", "is not a Python file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            experiment_file.load_config_file(spec)
        assert str(tmp_path) in _message(error)


def test_an_experiment_starts_from_its_sibling(tmp_path):
    """A file imports one beside it; files of the same name in two folders are not mixed up, and nothing is left."""
    for name, width in (("a", 64), ("b", 128)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "base_of_test.py").write_text(
            "from armd_jax.config import default_config_dict\n"
            f"def get_config(arg=''):\n    c = default_config_dict()\n    c.model.width = {width}\n    return c\n"
        )
        (folder / "child.py").write_text(
            "from base_of_test import get_config as base\n"
            "def get_config(arg=''):\n"
            "    import base_of_test\n"  # while get_config runs, too
            "    c = base()\n    c.model.num_heads = 4\n    return c\n"
        )
    configs = [experiment_file.load_config_file(str(tmp_path / name / "child.py")) for name in ("a", "b", "a")]
    assert [(config.model.width, config.model.num_heads) for config in configs] == [(64, 4), (128, 4), (64, 4)]
    assert "base_of_test" not in sys.modules
    assert not any(type(finder).__name__ == "_Siblings" for finder in sys.meta_path)
    assert not list(tmp_path.rglob("__pycache__"))


def test_fine_tuning_experiment_has_the_model_of_its_base():
    """sbp_finetune takes model and data of owt_small, so that its weights fit."""
    root = pathlib.Path(__file__).resolve().parent.parent / "experiments"
    base, tuned = (experiment_file.load_config_file(str(root / f"{name}.py")) for name in ("owt_small", "sbp_finetune"))
    assert (tuned.model.to_dict(), tuned.data.to_dict()) == (base.model.to_dict(), base.data.to_dict())
    assert tuned.order.kind == "strided"
