"""The notebook of the front page runs from top to bottom, on the package alone, and shows what its text says."""

import os
import pathlib
import re

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.slow

NOTEBOOK = pathlib.Path(__file__).parents[2] / "experiments/tour.ipynb"


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    """Everything that the executed notebook writes to stdout."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("tour")  # not the repository's: the notebook needs no file of it
    path = os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "TMPDIR": str(folder)}
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)  # raises if a cell does
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_it_is_committed_without_outputs():
    """Reviews show text alone, and nothing on the page can be older than the code."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(code) > 8
    assert not [cell for cell in code if cell.outputs or cell.execution_count is not None]


def test_probabilities_add_up_to_one(printed):
    """Section 3: for each of three orders."""
    assert re.findall(r"add up to (\S+)", printed) == ["1.000000"] * 3


def test_the_model_learns(printed):
    """Section 5: held-out text costs far less than the 3.8 bits per byte of an untrained model."""
    bits = [float(found) for found in re.findall(r"(\S+) bits per byte", printed)]
    left_to_right, two, four, random = bits
    assert left_to_right < 3.0
    assert left_to_right < two < four < random


def test_streams_save_network_calls(printed):
    """Section 6: the numbers of calls are those of S + ceil(R / S) - 1, and sampler and parallel pass agree."""
    calls = {int(streams): int(count) for streams, count in re.findall(r"(\d+) stream\(s\), (\d+) network", printed)}
    prompt = 128 - calls[1]
    assert 1 <= prompt <= 8
    assert calls[4] == 4 + -(-calls[1] // 4) - 1
    assert float(re.search(r"largest difference: (\S+) nats", printed)[1]) < 1e-3


def test_the_gap_is_filled(printed):
    """Section 7: three versions between the same beginning and the same end."""
    lines = re.findall(r"does not exist, \[.*?\]\s+and return the name of the new file\.", printed, re.DOTALL)
    assert len(lines) == 3 and len(set(lines)) == 3
