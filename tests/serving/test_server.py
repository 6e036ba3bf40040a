"""`armd serve` as a process: its address, its end, and what it refuses before it begins."""

import dataclasses
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from armd_jax.cli import main as cli
from armd_jax.config import Config, ModelConfig
from armd_jax.core import parameters
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop import load, readable
from armd_jax.serving import server

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory, lm) -> pathlib.Path:
    """An export of the tiny model."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    readable.write(readable.of(lm), Config(model=lm.config), folder)
    return folder


@pytest.fixture
def process(run, request):
    """A server at a free port, with its address. Its parameter: more arguments."""
    command = [sys.executable, "-m", "armd_jax", "serve", f"--run={run}", "--port=0", "--json", "--no-warm-up"]
    command += getattr(request, "param", [])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            yield started, json.loads(started.stdout.readline())
        finally:
            started.kill()


@pytest.mark.slow
def test_a_signal_ends_it_when_its_texts_are_whole(process, client):
    """A text that is being written is finished, no other is begun, and the exit code is 0."""
    started, address = process
    assert address["model"] == "tiny" and address["url"].startswith("http://127.0.0.1:")
    body = {"prompt": "a", "max_tokens": 60, "n": 16, "ignore_eos": True, "stream": True}
    with client.connection(address["url"]) as line:
        events = client.events(client.post(line, body))
        parts = [next(events)]
        started.send_signal(signal.SIGINT)
        parts += events
    assert sum(part["choices"][0]["finish_reason"] == "length" for part in parts) == 16
    out, errors = started.communicate(timeout=60)
    assert (started.returncode, out, errors) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("process", [["--grace=0"]], indirect=True)
def test_the_grace_ends_what_takes_too_long(process, client):
    """Texts that cannot be finished in time get an error that says so, and nobody waits for the rest of a body."""
    started, address = process
    half, line = (http.client.HTTPConnection(address["url"].removeprefix("http://"), timeout=60) for _ in range(2))
    half.putrequest("POST", "/v1/completions")
    half.putheader("Content-Type", "application/json")
    half.putheader("Content-Length", "100")
    half.endheaders(b"{")  # and nothing more, until the server has ended
    body = {"prompt": "a", "max_tokens": 60, "n": 32, "ignore_eos": True, "stream": True}
    answer = client.post(line, body)
    answer.readline()
    started.terminate()
    last = [row for row in answer.read().split(b"\n\n") if row][-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
    out, errors = started.communicate(timeout=60)
    assert (started.returncode, out, errors) == (0, "", "")
    with pytest.raises(ConnectionError):
        half.getresponse()


def test_a_port_that_is_taken_is_one_line(run, capsys):
    """Before the model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", f"--run={run}", f"--port={taken.getsockname()[1]}"]) == 2
    out, errors = capsys.readouterr()
    assert out == "" and errors.startswith("error: --host=127.0.0.1 --port=") and errors.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    ["--port=70000", "--host=no.such.host.invalid", "--max-batch=0", "--max-queue=0", "--max-tokens=0", "--grace=-1"]
    + ["--max-choices=0", "--grace=nan", "--run=no/such/run --port=0"],
)
def test_a_mistake_is_one_line(run, capsys, words):
    """Exit code 2, and the argument is named."""
    assert cli.main(["serve", *([f"--run={run}"] * ("--run" not in words)), *words.split()]) == 2
    out, errors = capsys.readouterr()
    name = words.split("=")[0].removeprefix("--")
    assert out == "" and errors.count("\n") == 1 and (name in errors or "no/such/run" in errors)


def test_a_denoiser_is_refused(tmp_path, lm, capsys):
    """It has no streams to show and no calls to share."""
    sizes = dict(vocab_size=257, max_length=8, num_layers=1, two_stream_layers=0, width=8, num_heads=2)
    config = ModelConfig(kind="denoiser", **sizes)
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), config))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    denoiser = LanguageModel(config, params, lm.tokenizer)
    readable.write(readable.of(denoiser), Config(model=config), tmp_path / "run")
    assert cli.main(["serve", f"--run={tmp_path / 'run'}", "--port=0"]) == 2
    assert "denoiser" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(tmp_path, lm, capsys, monkeypatch):
    """It is no denoiser, and has no text."""
    monkeypatch.setattr(load, "load", lambda *_: dataclasses.replace(lm, tokenizer=None))
    assert cli.main(["serve", f"--run={tmp_path}", "--port=0"]) == 2
    assert re.fullmatch("error: .* has no tokenizer.*\n", capsys.readouterr().err)


# Hides a package of the extra, as if it were not installed.
_WITHOUT = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "uvicorn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
from armd_jax.cli import main as cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_without_the_extra_one_line_names_it():
    """And exit code 2; `--help` still works."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _WITHOUT, "serve"]
    done = subprocess.run([*command, "--run=here"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: armd serve needs uvicorn, which is in an extra: pip install -e '.[serve]'\n"
    assert subprocess.run([*command, "--help"], env=environment, capture_output=True, timeout=60).returncode == 0


def test_names_of_the_server():
    """At a loopback address only names of this machine; at every address any name."""
    with server.listen("127.0.0.1", 0) as here, server.listen("0.0.0.0", 0) as everywhere:
        assert "*" not in server.hosts(here, "localhost") and "127.0.0.1" in server.hosts(here, "localhost")
        assert server.hosts(everywhere, "0.0.0.0") == ("*",)
        assert server.url(here) == f"http://127.0.0.1:{here.getsockname()[1]}"
    with pytest.raises(UserError, match="--port=-1"):
        server.listen("127.0.0.1", -1)
