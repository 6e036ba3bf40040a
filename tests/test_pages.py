"""The pages for readers: their links lead somewhere, their commands exist, and they agree with the code."""

import argparse
import pathlib
import re
import runpy
import shlex

import pytest
import yaml

from armd_jax import experiment_file
from armd_jax.cli import main as cli
from armd_jax.studies import plan

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = (".", ".github", "armd_jax", "experiments", "experiments/benchmarks", "launch", "tests")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
NOTEBOOK = ROOT / "experiments/tour.ipynb"
# Modules beside the rooms.
SECTIONS = {"order_config", "data_config"}
GROUND = {"errors", "typed", "names", "files", "remote", "streams", "config", "experiment_file", "sweeps"} | SECTIONS


def _name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def _anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _commands(page: pathlib.Path) -> list[list[str]]:
    """Every `armd …` command of a page, as words; continued lines are joined and placeholders kept."""
    text = page.read_text().replace("\\\n", " ")
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0] for block in fenced for line in block.splitlines()]
    spans = re.findall(r"`(armd [a-z][^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    found = [line[match.start() :] for line in lines if (match := re.search(r"(?<![\w.$/])armd (?=[a-z])", line))]
    return [shlex.split(command.replace("[", "").replace("]", "")) for command in found + spans]


def _options() -> dict[str, set[str]]:
    """The options of every verb."""
    parser = cli._parser()
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {name: {word for a in verb._actions for word in a.option_strings} for name, verb in verbs.choices.items()}


def test_pages_are_found():
    """The pages that the front page leads to are among those that are checked here."""
    names = {_name(page) for page in PAGES}
    assert {"README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md"} <= names
    assert {f"{folder}/README.md" for folder in ("armd_jax", "experiments", "launch", "tests")} <= names


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=_name)
def test_links_lead_somewhere(page):
    """Relative links and pictures exist, and so do the headings that they point at."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", page.read_text())):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in _anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_exist(page):
    """Every `armd` command of a page has a verb and options that there are, and sets fields that there are."""
    options = _options()
    for _, verb, *words in _commands(page):
        assert verb in options, verb
        for word in words:
            name, _, value = word.partition("=")
            if name.startswith("--config."):
                config = experiment_file.load_config_file(str(ROOT / "experiments/owt_small.py"))
                for part in name.removeprefix("--config.").split("."):
                    assert name == "--config.section.field" or part in config, word
                    config = config.get(part, {})
            elif name.startswith("--"):
                assert name in options[verb], f"{verb} {word}"
            if name == "--config" and not re.search(r"FILE|…", value):
                (
                    plan.load(str(ROOT / value), [])
                    if verb == "sweep"
                    else experiment_file.load_config_file(str(ROOT / value))
                )


def test_every_experiment_is_on_its_page():
    """The page about experiments has a row for every file, and the first result is the one that the front page has."""
    page = (ROOT / "experiments/README.md").read_text()
    for file in (ROOT / "experiments").glob("*.py"):
        assert f"[{file.name}]({file.name})" in page
    bits = re.search(r"Result: .*?(\d\.\d+) bits per byte", (ROOT / "experiments/quickstart.py").read_text())[1]
    assert f"{bits} bits per byte" in page
    assert f"**{bits}** bits per byte" in (ROOT / "README.md").read_text()


def test_the_arrows_are_those_that_are_tested():
    """The table of rooms in the page about the package is the one that test_architecture.py checks."""
    allowed = runpy.run_path(str(ROOT / "tests/test_architecture.py"))["ALLOWED"]
    page = (ROOT / "armd_jax/README.md").read_text()
    section = page.partition("## Rooms")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*?) ?\|$", section, re.MULTILINE)
    found = {room: set(re.findall(r"`(\w+)`", cell)) for room, cell in rows}
    wanted = {room: imports - GROUND - {room} for room, imports in allowed.items()}
    wanted["cli"] = found["cli"]  # "every room"
    assert found == wanted
    assert allowed["cli"] - GROUND == set(allowed)


def test_the_citation_can_be_read():
    """CITATION.cff has what the format asks for, and names the paper and this version."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["references"][0]["title"] == "Auto-Regressive Masked Diffusion Models"
    version = re.search(r'__version__ = "(.+)"', (ROOT / "armd_jax/__init__.py").read_text())[1]
    assert str(citation["version"]) == version
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
