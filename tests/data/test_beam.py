"""A Beam pipeline makes the folder of one process; what goes wrong in a step of it is one line."""

import json
import pathlib
import shutil
import sys

import pytest

from armd_jax.cli import main as cli

pytestmark = pytest.mark.slow


def _content(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_pipeline_makes_the_folder_of_one_process(corpus, tmp_path, capsys):
    """On Beam's own runner for one machine, with options of Beam; what is there is not made again."""
    pytest.importorskip("apache_beam", reason="the extra beam is not installed")
    words = ["prepare", f"--source={corpus}", "--tokenizer=bytes", "--length=16", "--workers=1", "--json"]
    assert cli.main([*words, f"--out={tmp_path / 'whole'}"]) == 0
    assert cli.main([*words, f"--out={tmp_path / 'out'}", "--shard=1/3"]) == 0
    first = _content(tmp_path / "out.parts")
    flags = ["--beam-flag=--runner=DirectRunner", "--beam-flag=--direct_num_workers=2"]
    flags += ["--beam-flag=--direct_running_mode=multi_threading"]
    assert cli.main([*words, f"--out={tmp_path / 'out'}", "--beam=3", *flags]) == 0
    assert _content(tmp_path / "out") == _content(tmp_path / "whole")
    assert first.items() < _content(tmp_path / "out.parts").items()
    shutil.rmtree(tmp_path / "out.parts")
    assert cli.main([*words, f"--out={tmp_path / 'out'}", "--beam=3"]) == 0  # it is whole, and needs no parts
    assert not (tmp_path / "out.parts").exists()
    capsys.readouterr()
    assert cli.main([*words, f"--out={tmp_path / 'new'}", "--beam=3", "--beam-flag=--direct_num_workers=x"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error == "error: --beam-flag: Beam takes no such options: --direct_num_workers=x"


def test_what_goes_wrong_in_a_step_is_one_line(tmp_path, capsys):
    """With the line and the file, although Beam wraps it in a traceback of its own."""
    pytest.importorskip("apache_beam", reason="the extra beam is not installed")
    lines = [json.dumps({"text": f"document {number}"}) for number in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines, "{", *lines]))
    command = ["prepare", f"--source={tmp_path / 'text.jsonl'}", "--tokenizer=bytes", f"--out={tmp_path / 'out'}"]
    assert cli.main([*command, "--length=16", "--beam=2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the pipeline failed: ") and "text.jsonl, line 41: not valid JSON" in error
    assert not (tmp_path / "out").exists()


def test_without_beam_one_line_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert cli.main(["prepare", f"--out={tmp_path / 'out'}", "--tokenizer=bytes", "--beam=2"]) == 2
    assert 'pip install "armd-jax[beam]"' in capsys.readouterr().err and not list(tmp_path.iterdir())
