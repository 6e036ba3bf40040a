"""What is wrong with a bucket is one line, within seconds, before any work, and leaves nothing behind."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from armd_jax import remote
from armd_jax.cli import main as cli

HERE = pathlib.Path(__file__).parent
ARMD = [sys.executable, "-m", "armd_jax"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("export --run={run} --out=gs://no-such-bucket/x", "no such bucket"),
        ("export --run={run} --out=s3://no-such-bucket/x", "no such bucket"),
        ("eval --run=gs://bucket/none", "there is no such folder"),
        ("train --config={config} --workdir=s3://no-such-bucket/x", "no such bucket"),
        ("train --config={config} --workdir=new --config.data.path=gs://bucket/none", "there are no objects"),
        ("train --config={config} --workdir=new --config.data.path=s3://no-such-bucket/*.txt", "no such bucket"),
        ("prepare --source=gs://no-such-bucket/text --out=new --tokenizer=bytes", "no such bucket"),
        ("prepare --source=s3://bucket/none/*.jsonl --out=new --tokenizer=bytes", "there are no objects"),
    ],
)
def test_mistakes(ports, smoke_run, smoke_config, capsys, tmp_path, monkeypatch, line, why):
    """One line that names the address, exit code 2, and nothing on the disk."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.format(run=smoke_run, config=smoke_config).split()) == 2
    (err,) = capsys.readouterr().err.splitlines()
    assert err.startswith("error: ") and "://" in err and why in err
    assert not list(tmp_path.iterdir()) and not remote._copies


def _said(words: list[str], environment: dict[str, str], seconds: float = 40) -> str:
    """The one line that a command prints, which has to come within so many seconds."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=seconds)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and not done.stdout
    return line


_HIDDEN = """
import sys
sys.modules[sys.argv.pop(1)] = None  # as if it were not installed
from armd_jax.cli import main
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("library", "scheme"), [("gcsfs", "gs"), ("s3fs", "s3"), ("fsspec", "s3")])
def test_no_extra(library, scheme):
    """Without a library, one line names it and the extra."""
    line = _said([sys.executable, "-c", _HIDDEN, library, "eval", f"--run={scheme}://bucket/run"], dict(os.environ))
    assert f"{scheme}://bucket/run: needs " in line and "pip install -e '.[cloud]'" in line


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_denied_writes(ports, serve, environment, smoke_config, scheme, tmp_path):
    """One line, before any work."""
    train = [*ARMD, "train", f"--config={smoke_config}", f"--workdir={scheme}://bucket/denied"]
    prepare = [*ARMD, "prepare", "--tokenizer=bytes", f"--out={scheme}://bucket/denied"]
    cached = [*ARMD, "train", f"--config={smoke_config}", f"--workdir={tmp_path / 'run'}"]
    cached.append(f"--config.data.cache_dir={scheme}://bucket/denied")
    with serve(str(HERE / "faulty_proxy.py"), "PORT", str(ports[scheme]), "--denied=1") as proxy:
        for command in (train, prepare, cached):
            assert "access is denied" in _said(command, os.environ | environment(proxy, proxy))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("train --config={config} --workdir=gs://bucket/run", "gcloud auth application-default login"),
        ("eval --run=gs://bucket/run", "no credentials for it"),
        ("train --config={config} --workdir=s3://bucket/run", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_no_credentials(smoke_config, tmp_path, line, why):
    """One line within seconds; for one command, with a metadata server that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        metadata = f"127.0.0.1:{silent.getsockname()[1]}"
        theirs = ("AWS_", "GOOGLE_", "STORAGE_EMULATOR", "TENSORSTORE_", "CLOUDSDK_")
        bare = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        bare |= {"HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path), "AWS_CONFIG_FILE": str(tmp_path / "none")}
        bare |= {"GCE_METADATA_IP": metadata, "GCE_METADATA_HOST": metadata, "GCE_METADATA_TIMEOUT": "1"}
        bare |= {"AWS_EC2_METADATA_DISABLED": "true"} | ({} if "gcloud" in why else {"NO_GCE_CHECK": "true"})
        bare |= {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
        line = _said([*ARMD, *line.format(config=smoke_config).split()], bare)
    assert "no credentials for it" in line and why in line
