"""The benchmarks run and print what their page says; the figures themselves are not tested."""

import json

import pytest

pytestmark = pytest.mark.slow

TINY = ["--layers=2", "--two-stream=1", "--width=16", "--heads=2", "--length=16", "--vocab=32", "--no-hf"]
SMOKE = ["--config=experiments/quickstart.py:smoke", "--config.model.width=16", "--config.model.max_length=16"]


@pytest.mark.parametrize(
    ("script", "flags", "key"),
    [
        ("train_step.py", [*TINY, "--batch=2", "--pairs=2"], "step_ratio_armd_ar"),
        ("decode.py", [*TINY, "--batches=1", "--streams", "1", "2", "--repeats=1"], "decode"),
        ("attention.py", ["--lengths", "16", "--batch=1", "--heads=1", "--chunk=8", "--turns=2"], "results"),
        ("mfu.py", [*SMOKE, "--rows=2", "--vocab=32", "--product=16", "--turns=1"], "models"),
    ],
)
def test_benchmark_prints_its_figures(run_benchmark, script, flags, key):
    """A tiny run ends with one JSON object that names machine, versions and the figures."""
    found = run_benchmark(script, *flags, "--json")
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert result["versions"]["jax"] and result["device"] and result[key]


def test_attention_ratios_are_to_the_chunked_case(run_benchmark):
    """Every implementation of every length has a time and a ratio, and the chunked one's is 1."""
    found = run_benchmark(
        "attention.py", "--lengths", "8", "16", "--batch=1", "--heads=1", "--chunk=8", "--turns=1", "--json"
    )
    rows = json.loads(found.stdout)["results"]
    assert [row["length"] for row in rows] == [8] * 3 + [16] * 3
    assert [row["time_to_chunked"] for row in rows if row["implementation"] == "chunked"] == [1.0, 1.0]
    assert all(row["milliseconds"] > 0 for row in rows)


@pytest.mark.parametrize(
    "flags", [["train_step.py", "--batch=0"], ["attention.py", "--batch=0"], ["mfu.py", *SMOKE, "--rows=0"]]
)
def test_a_benchmark_of_nothing_is_an_error(run_benchmark, flags):
    """An empty batch is an error of one line without a traceback."""
    found = run_benchmark(*flags)
    assert found.returncode != 0 and found.stderr.startswith("error: ") and "Traceback" not in found.stderr
