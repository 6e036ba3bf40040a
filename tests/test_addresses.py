"""Addresses are not paths: what can be neither read nor written there says so, see also object_storage/."""

import argparse
import dataclasses
import pathlib
import typing

import pytest

import armd_jax as armd
from armd_jax import files
from armd_jax.cli import main as cli
from armd_jax.config import Config
from armd_jax.errors import UserError

PREPARE = "prepare --out=new --length=16 --tokenizer=bytes"
TRAIN = "train --config={smoke} --workdir=new"
EVAL = "eval --run=here"

# Command lines, and the argument or the field that the one line must name. Every row has one address.
COMMANDS = [
    ("prepare --source=hdfs://host/*.jsonl --out=new", "--source"),
    ("prepare --out=hdfs://host:9000/prepared", "--out"),
    (f"{PREPARE} --tokenizer=hf://gpt2", "--tokenizer"),
    ("train --config=https://example.org/experiment.py --workdir=new", "--config"),
    ("train --config={smoke} --workdir=hdfs://host/run", "--workdir"),
    ("train --config={smoke} --workdir=az://bucket/run", "--workdir"),
    ("train --config={smoke} --workdir=hdfs:/host/run", "--workdir"),  # what pathlib makes of hdfs://
    (f"{TRAIN} --config.data.path=abfss://bucket/text.jsonl", "data.path"),
    (f"{TRAIN} --config.data.path=tfds:gs://bucket/lm1b/1.0.0", "data.path"),
    (f"{TRAIN} --config.data.path=file:///text.jsonl", "data.path"),
    (f"{TRAIN} --config.data.mixture=file:///prepared:1", "data.mixture"),
    (f"{TRAIN} --config.data.tfds_data_dir=gs://bucket/tfds", "data.tfds_data_dir"),
    (f"{TRAIN} --config.data.tokenizer=https://example.org/gpt2", "data.tokenizer"),
    (f"{TRAIN} --config.data.cache_dir=hdfs://host:9000/prepared", "data.cache_dir"),
    (f"{TRAIN} --config.training.init_from=abfss://container@account/run", "training.init_from"),
    ("sweep --config=gs://bucket/sweep.py --out=new", "--config"),
    ("sweep --config={smoke} --out=gs://bucket/sweep", "--out"),
    ("eval --run=hdfs://host/run", "--run"),
    (f"{EVAL} --data=s3a://bucket/text.txt", "--data"),
    (f"{EVAL} --out=s3a://bucket/figures", "--out"),
    (f"{EVAL} --tasks=own --include-path=https://example.org/tasks", "--include-path"),
    (f"{EVAL} --judge=https://example.org/judge", "--judge"),
    (f"{EVAL} --judge=here --reference=hdfs://host/text.txt", "--reference"),
    (f"{EVAL} --suite=all --suite-data=hdfs://host/suites", "--suite-data"),
    (f"{EVAL} --suite=all --suite-tfds=https://example.org/tfds", "--suite-tfds"),
    ("sample --run=S3://bucket/run", "--run"),
    ("sample --run=here --out=hdfs://host/samples", "--out"),
    ("sample --run=here --prompts=gs://bucket/prompts.jsonl --out=new", "--prompts"),
    ("export --run=hdfs://host/run --out=new", "--run"),
    ("export --run=here --out=https://example.org/export", "--out"),
    ("import --from=hf://openai-community/gpt2 --out=new", "--from"),
    ("import --from=here --out=az://bucket/export", "--out"),
    ("checkpoints --run=dbfs:/mnt/run", "--run"),
    ("report --run=abfss://bucket/run", "--run"),
    ("report --sweep=gs://bucket/sweep", "--sweep"),
    ("profile --run=hdfs://host/run", "--run"),
    ("report --run=here --out=hdfs://host/report", "--out"),
    ("serve --run=hdfs://host/run", "--run"),
    ("compile --topology=v5e:4x4 --config=gs://bucket/experiment.py", "--config"),
    ("compile --topology=v5e:4x4 --config={smoke} --dump-hlo=gs://bucket/program.txt", "--dump-hlo"),
]
# Arguments and fields that take a text which names no file.
OTHER_TEXTS = {"--text-field", "--coordinator", "--topology", "--streams", "--steps", "--stop", "--prompt", "--suffix"}
OTHER_TEXTS |= {"--mesh", "--host", "--tasks", "--shard", "--beam-flag", "--only", "--launcher-flag", "--suite-sets"}
OTHER_TEXTS |= {"--temperatures", "--modes", "--samplers"}  # of texts under a judge
OTHER_TEXTS |= {"--metric", "--rows", "--baseline", "--reach"}  # of the report of a sweep
OTHER_FIELDS = {"data.text_field", "training.wandb_project"}


@pytest.mark.parametrize(("line", "where"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_an_address_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys, smoke_config, line, where):
    """One line that names the argument or the field, exit code 2, and nothing on disk, not even a folder `gs:`."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.format(smoke=smoke_config).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and where in err and ":/ begins the address of something" in err
    assert not list(tmp_path.iterdir())


def test_the_table_has_every_path_of_every_verb():
    """Each argument of a verb that takes any text, and each free text of the config, is in the table or is no path."""
    tried = {(line.split()[0], where) for line, where in COMMANDS}
    (verbs,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    for verb, parser in verbs.choices.items():
        for action in parser._actions:
            flag = action.option_strings[0]
            takes_text = action.nargs != 0 and action.choices is None and action.type not in (int, float)
            assert not takes_text or flag in OTHER_TEXTS or (verb, flag) in tried, f"armd {verb} {flag}"
    for section in dataclasses.fields(Config):
        for name, hint in typing.get_type_hints(type(getattr(Config(), section.name))).items():
            field = f"{section.name}.{name}"
            assert hint is not str or field in OTHER_FIELDS or ("train", field) in tried, field
    assert len(COMMANDS) == len(set(COMMANDS)) >= 15


@pytest.mark.parametrize(
    "path",
    [
        "",
        "run",
        "/data/run",
        "./gs:/bucket",
        "runs/gs://x",
        "tfds:lm1b",
        "tfds:/data/lm1b/1.0.0",
        "C:/text",
        "a:b",
        "*.txt",
    ]
    + ["experiments/quickstart.py:smoke", "quickstart.py:/data", "2024-01-01T10:00/run"],
)
def test_what_may_be_a_path_is_left_alone(path):
    """Colons, globs, TFDS names and experiment arguments are not taken for addresses."""
    assert files.not_local(path) == ""


def test_load_refuses_an_address():
    """From Python too, where pathlib has made `gs:/bucket` of it already."""
    for address in ("hdfs://host/run", pathlib.Path("hdfs://host/run")):
        with pytest.raises(UserError, match="path='hdfs:/.*only paths on this machine"):
            armd.load(address)
