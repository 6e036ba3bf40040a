"""Servers on loopback that stand for object storage: an emulator of GCS, and moto for S3."""

import contextlib
import importlib.util
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from armd_jax import files, remote
from armd_jax.training import run_log

HERE = pathlib.Path(__file__).parent
NEEDED = ("gcsfs", "s3fs", "gcp_storage_emulator", "moto")
SECRET = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session", autouse=True)
def _needed() -> None:
    if not all(map(importlib.util.find_spec, NEEDED)):
        pytest.skip(f"needs {', '.join(NEEDED)}")


@contextlib.contextmanager
def _server(*command: str) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    words = [str(port) if word == "PORT" else word for word in command]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def _environment(gs_port: int, s3_port: int) -> dict[str, str]:
    gs = f"http://127.0.0.1:{gs_port}"
    s3 = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}"}
    return {"STORAGE_EMULATOR_HOST": gs, "TENSORSTORE_GCS_HTTP_URL": gs} | SECRET | s3


@pytest.fixture(scope="session")
def serve() -> Callable[..., contextlib.AbstractContextManager[int]]:
    """`with serve("script.py", "PORT", ...) as port:` runs a server; PORT in the command is a free one."""
    return _server


@pytest.fixture(scope="session")
def environment() -> Callable[[int, int], dict[str, str]]:
    """The environment that leads to two ports instead of to Google and to Amazon."""
    return _environment


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, int]]:
    """The ports of both servers, each with the bucket `bucket`; the environment leads there."""
    gs = _server(str(HERE / "object_store.py"), "PORT")
    s3 = _server("-m", "moto.server", "-H", "127.0.0.1", "-p", "PORT")
    with gs as gs_port, s3 as s3_port, pytest.MonkeyPatch.context() as patch:
        for name, value in _environment(gs_port, s3_port).items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        yield {"gs": gs_port, "s3": s3_port}
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """No copy of a bucket is left for the next test, also none of another folder: commands would fetch it."""
    yield
    remote.forget_all()


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest, ports: dict[str, int]) -> str:
    """The address of a bucket."""
    return f"{request.param}://bucket"


@pytest.fixture(scope="session")
def metrics() -> Callable[[pathlib.Path], list[dict[str, object]]]:
    """Gives the rows of a metrics.jsonl without what a clock decides."""

    def read(file: pathlib.Path) -> list[dict[str, object]]:
        rows = files.read_json_lines(file)
        return [{name: row[name] for name in row if name not in run_log.SPEED} for row in rows]

    return read
