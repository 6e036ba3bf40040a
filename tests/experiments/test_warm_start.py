"""The benchmark of warm starts."""

import json

import pytest


@pytest.mark.slow
def test_an_ar_model_goes_on_as_an_armd(run_benchmark, tmp_path):
    """All three runs have a curve and figures, and what is finished is not run again."""
    flags = ["--smoke", "--steps=4", "--ar-steps=2", f"--workdir={tmp_path / 'runs'}", "--json"]
    done = run_benchmark("warm_start.py", *flags, f"--picture={tmp_path / 'curves.png'}")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)["runs"]
    assert {name: run["steps"] for name, run in found.items()} == {"ar": 2, "warm": 2, "scratch": 4}
    for run in found.values():
        assert run["curve"][-1][0] == run["steps"] and run["evaluation"]["left_to_right"]["bits_per_byte"] > 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = {file: file.read_bytes() for file in (tmp_path / "runs").glob("*/metrics.jsonl")}
    again = run_benchmark("warm_start.py", *flags)
    assert again.returncode == 0 and json.loads(again.stdout)["runs"] == found
    assert len(before) == 3 and all(file.read_bytes() == content for file, content in before.items())


def test_a_warm_start_needs_steps(run_benchmark, tmp_path):
    """One line, and no folder."""
    done = run_benchmark("warm_start.py", "--steps=4", "--ar-steps=4", f"--workdir={tmp_path / 'runs'}")
    assert done.returncode == 2 and done.stderr.startswith("error: --ar-steps=4: must be in 1 .. 2")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "runs").exists()
