"""The launch scripts are valid shell and explain themselves."""

import pathlib
import re
import subprocess
import sys

import pytest

from armd_jax.compilation import topology

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = [
    ROOT / "launch" / name for name in ("quickstart.sh", "test.sh", "prove.sh", "chaos.sh", "smollm2.sh", "study.sh")
]


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "launch" / "environment.sh", ROOT / ".ci" / "run"])
def test_shell_syntax(script):
    """bash parses the script."""
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    """--help says what the script does and how it is used, and does nothing else, even in the script's own folder."""
    command = ["bash", script.name, "--help"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=script.parent)
    assert f"usage: bash launch/{script.name}" in result.stdout
    assert len(result.stdout.splitlines()) >= 2


@pytest.mark.parametrize(("words", "reason"), [([], "name the TEXT"), (["no text.txt"], "no text.txt: there is no")])
def test_a_study_of_no_text_is_one_line(tmp_path, words, reason):
    """Nothing is installed and nothing trained: the script says so where it was called."""
    script = ROOT / "launch" / "study.sh"
    result = subprocess.run(["bash", str(script), *words], capture_output=True, text=True, cwd=tmp_path)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and result.stdout == "" and line.startswith("error: ") and reason in line


def test_a_python_that_is_too_old_is_one_line(tmp_path):
    """If there is no Python that is new enough, the script says so, ends with code 2 and makes nothing."""
    script = f'cd {tmp_path}; . {ROOT}/launch/environment.sh; PYTHON=false use_environment .venv ""'
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("present", "chosen", "newer"),
    [
        (("3.11", "3.13", "3.12"), "", "python3.12"),
        (("3.11", "3.10"), "", None),
        (("3.11", "3.12"), "python3.12", None),
    ],
    ids=str,
)
def test_a_newer_python_beside_an_older_one(tmp_path, present, chosen, newer):
    """A Python of 3.12 or newer is found, but only if the tests themselves run on an older one."""
    for version in present:
        fake = tmp_path / f"python{version}"
        info = tuple(map(int, version.split(".")))
        fake.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = {info}\nexec(sys.argv[2])\n")
        fake.chmod(0o755)
    command = f"PATH={tmp_path}; PYTHON={chosen}; . {ROOT}/launch/environment.sh; newer_python"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == ((0, newer) if newer else (1, "")), result.stderr


def test_prove_scales_one_config():
    """--scaling compiles one config for 16, 256 and 512 chips, with one batch and with 32 rows for each chip."""
    command = ["bash", ROOT / "launch" / "prove.sh", "--dry-run", "--scaling"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    sizes, others = [], set()
    for line in lines:
        words = dict(word.split("=") for word in line.split() if "=" in word)
        chips = topology.parse(words.pop("--topology"), int(words.pop("--slices", 1))).chips
        sizes.append((chips, int(words.pop("--config.training.batch_size", 512))))
        others.add(tuple(words.items()))
    assert sizes == [(16, 512), (256, 512), (512, 512), (256, 32 * 256), (512, 32 * 512)] and len(others) == 1


def test_prove_names_every_preset():
    """--dry-run prints one command for every OpenWebText experiment, for a slice that the compiler knows."""
    command = ["bash", ROOT / "launch" / "prove.sh", "--dry-run"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    presets = {f"experiments/{file.name}" for file in (ROOT / "experiments").glob("owt_*.py")}
    assert {line.split("--config=")[1].split()[0] for line in lines} == presets
    for line in lines:
        words = dict(word.split("=") for word in line.split() if "=" in word)
        assert line.startswith("armd compile ") and topology.parse(words["--topology"]).chips >= 16


def test_pages_name_the_commands():
    """The front page gives the two commands literally, and the page about experiments names the other scripts."""
    front, experiments = ((ROOT / page).read_text() for page in ("README.md", "experiments/README.md"))
    assert "bash launch/quickstart.sh" in front and "bash launch/test.sh" in front
    for script in SCRIPTS:
        assert f"bash launch/{script.name}" in front + experiments


def test_the_list_of_files_is_complete():
    """The page about the package names every module, and no file that is not there."""
    listed = set(re.findall(r"`([\w/]+\.py)`", (ROOT / "armd_jax/README.md").read_text().partition("## Files")[2]))
    modules = {str(file.relative_to(ROOT / "armd_jax")) for file in (ROOT / "armd_jax").rglob("*.py")}
    assert listed == {module for module in modules if not module.endswith("/__init__.py")}
