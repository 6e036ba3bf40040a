"""The launch scripts are valid shell and explain themselves."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = [ROOT / "launch" / "quickstart.sh", ROOT / "launch" / "test.sh"]


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "launch" / "environment.sh", ROOT / ".ci" / "run"])
def test_shell_syntax(script):
    """bash parses the script."""
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    """--help says what the script does and how it is used, and does nothing."""
    result = subprocess.run(["bash", script, "--help"], check=True, capture_output=True, text=True)
    assert f"usage: bash launch/{script.name}" in result.stdout
    assert len(result.stdout.splitlines()) >= 2


def test_a_python_that_is_too_old_is_one_line(tmp_path):
    """Where no fitting Python is found the script says so and ends with code 2, making nothing."""
    script = f'cd {tmp_path}; . {ROOT}/launch/environment.sh; PYTHON=false use_environment .venv ""'
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_readme_names_the_commands():
    """The two commands of the README are these scripts, and its file list names every module."""
    readme = (ROOT / "README.md").read_text()
    for script in SCRIPTS:
        assert f"bash launch/{script.name}" in readme
    for module in (ROOT / "armd_jax").rglob("*.py"):
        if module.name != "__init__.py":
            assert str(module.relative_to(ROOT / "armd_jax")) in readme, module
