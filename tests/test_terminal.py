"""What a terminal cannot show, what people write for "none", and how long a command may be silent."""

import argparse
import io
import os
import pathlib
import socket
import subprocess
import sys
import threading

import pytest

from armd_jax import config as configs
from armd_jax.cli import main as cli
from armd_jax.cli.arguments import show
from armd_jax.cli.main import VERBS
from armd_jax.errors import UserError
from armd_jax.experiment_file import apply_overrides

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_python_m_is_the_command(tmp_path):
    """From any folder, `python -m armd_jax` lists the verbs, also if the terminal knows ASCII alone."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "armd_jax", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: armd ") and all(f"\n    {verb}" in done.stdout for verb in VERBS)


@pytest.mark.parametrize(
    ("name", "encoding", "shown"),
    [
        (b"caf\xc3\xa9", "ascii", b"caf\\xe9:"),
        (b"caf\xc3\xa9", "latin-1", b"caf\xe9:"),
        ("\N{DEVANAGARI LETTER A}".encode(), "cp1252", b"\\u0905:"),
    ],
    ids=["ascii", "latin-1", "cp1252"],
)
def test_what_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch, corpus, name, encoding, shown):
    """Data are prepared in a folder with such a name, and the result that is printed names it."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    out = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
    argv = ["prepare", f"--source={corpus}", f"--out={out}", "--tokenizer=bytes", "--length=64"]
    assert cli.main(argv) == 0
    stdout.flush()
    assert shown in stdout.buffer.getvalue() and (pathlib.Path(out) / "manifest.json").exists()


def test_names_that_are_not_text_are_escaped_or_refused(tmp_path, monkeypatch, capsys, corpus):
    """Results show escapes for bytes that no encoding has. Rows cannot be in such a folder, which is one error."""
    argv = ["prepare", f"--source={corpus}", f"--out={tmp_path}/\udcff", "--tokenizer=bytes", "--length=64"]
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("because the name is not UTF-8 text")
    assert not list(tmp_path.iterdir())

    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.main(argv) == 2  # which prepares the stream
    show(argparse.Namespace(json=False), {}, "/data/\udcff")
    assert stdout.buffer.getvalue() == b"/data/\\udcff\n"


@pytest.mark.parametrize("word", ["None", "none", "NONE", "null", " Null "])
@pytest.mark.parametrize(
    "field", ["training.wandb_project", "training.init_from", "data.cache_dir", "data.tfds_data_dir"]
)
def test_none_is_no_name(field, word):
    """A text that may be left out is left out if it is None or null, on the command line and in a stored config."""
    section, name = field.split(".")
    values = configs.default_config_dict()
    apply_overrides(values, [f"--config.{field}=something"])
    assert getattr(getattr(configs.from_config_dict(values), section), name) == "something"
    apply_overrides(values, [f"--config.{field}={word}"])
    assert getattr(getattr(configs.from_config_dict(values), section), name) == ""
    for stored in (word, None):
        assert getattr(getattr(configs.from_config_dict({section: {name: stored}}), section), name) == ""


def test_an_experiment_file_may_say_none():
    """`config.training.wandb_project = None` is no project, and the command line can still name one."""
    values = configs.default_config_dict()
    values.training.wandb_project = None
    assert configs.from_config_dict(values).training.wandb_project == ""
    apply_overrides(values, ["--config.training.wandb_project=mine"])
    assert configs.from_config_dict(values).training.wandb_project == "mine"


def test_none_is_not_the_name_of_text_or_of_a_tokenizer():
    """What has a meaning of its own if it is empty, or is never empty, is not chosen by a variable that is not set."""
    values = {"data": {"path": "None", "tokenizer": "null", "text_field": "none"}}
    data = configs.from_config_dict(values).data
    assert (data.path, data.tokenizer, data.text_field) == ("None", "null", "none")
    with pytest.raises(UserError, match="data.path=None: expected str"):
        configs.from_config_dict({"data": {"path": None}})


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_a_wait_for_other_processes_is_told_after_five_seconds(tmp_path, smoke_config):
    """Under SLURM's variables but without srun, and without anybody at the coordinator's address."""
    command = [sys.executable, "-m", "armd_jax", "train", f"--config={smoke_config}", f"--workdir={tmp_path / 'run'}"]
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_NODES": "1"}
    coordinator = [f"--coordinator=127.0.0.1:{_free_port()}", "--num-processes=2", "--process-id=1"]
    base = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    start = lambda words, more: subprocess.Popen(  # noqa: E731
        [*command, *words], env=base | more, stderr=subprocess.PIPE, text=True
    )
    waiting = [start([], slurm), start(coordinator, {})]
    too_late = threading.Timer(60, lambda: [process.kill() for process in waiting])
    too_late.start()
    try:
        lines = [next((line for line in process.stderr if line.startswith("waiting ")), "") for process in waiting]
        assert all(process.poll() is None for process in waiting)
    finally:
        too_late.cancel()
        for process in waiting:
            process.kill()
            process.communicate()
    assert all(line.startswith("waiting for the ") and "--distributed=off" in line for line in lines), lines
    assert "SLURM_NTASKS=2, SLURM_PROCID=0" in lines[0] and "srun" in lines[0]
    assert coordinator[0].removeprefix("--coordinator=") in lines[1] and "number 1" in lines[1]


@pytest.mark.slow
def test_half_of_slurms_variables_are_an_error_that_names_them(tmp_path, smoke_config):
    """As in a batch script that forgot srun: one line, which says what was seen and both ways out."""
    command = [sys.executable, "-m", "armd_jax", "train", f"--config={smoke_config}", f"--workdir={tmp_path / 'run'}"]
    half = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    done = subprocess.run(command, env=os.environ | half, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --distributed=auto: no other processes were found")
    assert "SLURM_NTASKS=2, SLURM_PROCID=0" in done.stderr and "srun" in done.stderr
    assert not (tmp_path / "run").exists()
