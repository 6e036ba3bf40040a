"""Compiled programs are kept between commands, in a folder that the user can choose."""

import os
import pathlib
import subprocess
import sys

import pytest

from armd_jax.cli import compilation_cache

pytestmark = pytest.mark.slow


def _sample(
    run: pathlib.Path, out: pathlib.Path, home: pathlib.Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`armd sample` as a user runs it, whose caches are below `home`."""
    kept = {name: value for name, value in os.environ.items() if name not in _DECIDED}
    command = [sys.executable, "-m", "armd_jax", "sample", f"--run={run}", "--length=32", "--streams=2"]
    environment = kept | {"XDG_CACHE_HOME": str(home)} | environment
    command += [f"--out={out}", "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


_DECIDED = (compilation_cache.FOLDER, compilation_cache.LEAST_SECONDS)


def _entries(folder: pathlib.Path) -> set[pathlib.Path]:
    return {file for file in folder.rglob("*") if file.is_file() and file.name.endswith("-cache")}


def test_a_second_command_finds_the_programs(tmp_path, smoke_run):
    """In the user's cache, or in the folder that JAX's own variable names; an empty one keeps nothing."""
    home = tmp_path / "home"
    least = {compilation_cache.LEAST_SECONDS: "0"}
    first = _sample(smoke_run, tmp_path, home, **least)
    kept = _entries(home)
    assert first.returncode == 0 and any("advance" in file.name for file in kept), first.stderr
    again = _sample(smoke_run, tmp_path, home, **least, JAX_LOGGING_LEVEL="DEBUG")
    assert again.returncode == 0 and _entries(home) == kept
    assert "cache hit for 'jit_advance'" in again.stderr and "CACHE MISS for 'jit_advance'" not in again.stderr
    chosen = tmp_path / "chosen"
    assert (
        _sample(smoke_run, tmp_path, tmp_path / "other", **least, **{compilation_cache.FOLDER: str(chosen)}).returncode
        == 0
    )
    assert _entries(chosen) and not (tmp_path / "other").exists()
    assert _sample(smoke_run, tmp_path, tmp_path / "none", **least, **{compilation_cache.FOLDER: ""}).returncode == 0
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_made_costs_nothing(tmp_path, smoke_run):
    """The command does its work without a cache, and without a word about it."""
    (tmp_path / "file").write_text("")
    done = _sample(smoke_run, tmp_path, tmp_path / "file" / "home")
    assert done.returncode == 0 and "cache" not in done.stderr, done.stderr


def test_a_process_that_has_jax_already_is_left_alone(monkeypatch):
    """Its environment, which its children inherit, stays as it is."""
    for name in _DECIDED:
        monkeypatch.delenv(name, raising=False)
    compilation_cache.settle()
    assert not set(_DECIDED) & set(os.environ)
