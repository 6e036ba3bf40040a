"""Loading is safe: nothing that is read is executed or unpickled, and nothing is written where a file says."""

import ast
import contextlib
import json
import os
import pathlib
import pickle
import shutil
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import armd_jax as armd
from armd_jax.cli import main as cli
from armd_jax.data import packing, tokenizers
from armd_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

PACKAGE = pathlib.Path(armd.__file__).parent
ROOT = PACKAGE.parent
# Modules that turn bytes into objects or code, and calls that do.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "runpy", "code"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {
    *(f"{module}.load" for module in ("np", "numpy", "jnp", "torch", "yaml", "joblib")),
    *("np.loadtxt", "np.fromregex", "os.system", "os.popen", "torch.hub", "importlib.import_module"),
    *("tokenizers.Tokenizer.from_file", "library.Tokenizer.from_file", "library.Tokenizer.from_str"),
}
FORBIDDEN_KEYWORDS = {"allow_pickle", "trust_remote_code", "weights_only", "shell"}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _dangers(source: str) -> list[str]:
    """What a source uses of the above."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module for _ in [0] if (node.module or "").split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and _dotted(node) in FORBIDDEN_ATTRIBUTES:
            found.append(_dotted(node))
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_KEYWORDS and not _declines(node):
            found.append(node.arg)
        elif isinstance(node, ast.Call) and _dotted(node.func).endswith(".from_pretrained"):
            found += [] if any(map(_declines, node.keywords)) else ["from_pretrained"]
    return found


def _declines(keyword: ast.keyword) -> bool:
    """Whether it is trust_remote_code=False, as every folder that transformers reads has to be opened."""
    value = keyword.value
    return keyword.arg == "trust_remote_code" and isinstance(value, ast.Constant) and value.value is False


def test_the_package_has_no_way_to_run_what_it_reads():
    """No module unpickles, evaluates or imports by a name that it read. Two places import: experiment files, which are
    the user's own Python, and the lazy public names, which are constants. One place gives the text of a tokenizer.json
    to the library that defines that file. Its size and its JSON are checked before, it names components of a closed
    set, and nothing in it is a path: `test_a_tokenizer_json_is_only_data` tries."""
    found = {
        file.relative_to(PACKAGE).as_posix(): dangers
        for file in PACKAGE.rglob("*.py")
        if (dangers := _dangers(file.read_text(encoding="utf-8")))
    }
    assert found == {
        "__init__.py": ["importlib.import_module"] * 2,
        "data/vocabulary_building.py": ["library.Tokenizer.from_str"],
    }
    loaders = [file.name for file in PACKAGE.rglob("*.py") if "exec_module" in file.read_text(encoding="utf-8")]
    assert loaders == ["experiment_file.py"]


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "import yaml", "eval('1')", "exec(x)", "run = eval"]
    + ["np.load(f)", "torch.load(f)", "f(x, allow_pickle=True)", "os.system('x')", "import marshal as m"]
    + ["x.from_pretrained(f)", "x.from_pretrained(f, trust_remote_code=True)", "g(trust_remote_code=flag)"],
)
def test_the_check_finds_what_it_looks_for(source):
    assert _dangers(source)


# --- payloads -------------------------------------------------------------------------------------------------------


class _Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: pathlib.Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self._marker,))


_WATCHED = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}
_watch: list[list[str]] = []  # an audit hook stays for ever: it writes where somebody is looking


def _hook(event: str, args: tuple) -> None:
    if _watch and event in _WATCHED:
        _watch[-1].append(f"{event} {args}")


@pytest.fixture(scope="module", autouse=True)
def _installed_hook() -> None:
    sys.addaudithook(_hook)


@contextlib.contextmanager
def _nothing_runs(marker: pathlib.Path) -> Iterator[None]:
    _watch.append([])
    try:
        yield
    finally:
        events = _watch.pop()
    assert not marker.exists() and not events, events


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, smoke_run: pathlib.Path) -> pathlib.Path:
    out = tmp_path_factory.mktemp("safe") / "export"
    assert cli.main(["export", f"--run={smoke_run}", f"--out={out}"]) == 0
    return out


@pytest.fixture
def run(tmp_path: pathlib.Path, smoke_run: pathlib.Path) -> pathlib.Path:
    """A copy of the smoke run with its newest checkpoint."""
    older = ("10", "20", "30", "tensorboard", "data")
    return pathlib.Path(shutil.copytree(smoke_run, tmp_path / "run", ignore=shutil.ignore_patterns(*older)))


def test_the_payload_and_the_watch_work(tmp_path):
    """The payload of these tests does run where it is unpickled, and the hook sees it."""
    _watch.append([])
    pickle.loads(pickle.dumps(_Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists() and "mkdir" in "".join(_watch.pop())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer/tokenizer_config.json"])
def test_pickles_in_an_export_are_refused(tmp_path, export, name):
    """A file of an export that is a pickle is an error, and is not unpickled."""
    folder = pathlib.Path(shutil.copytree(export, tmp_path / "export"))
    (folder / name).write_bytes(pickle.dumps(_Payload(tmp_path / "ran")))
    with _nothing_runs(tmp_path / "ran"), pytest.raises(UserError):
        armd.load(folder)


@pytest.mark.slow
def test_pickles_in_a_checkpoint_are_refused(tmp_path, run):
    """Whatever file of a checkpoint is a pickle: it is not unpickled."""
    files = [file for file in (run / "checkpoints").rglob("*") if file.is_file()]
    assert len(files) > 3
    arrays = [file for file in files if "ocdbt" in str(file)]
    payload = pickle.dumps(_Payload(tmp_path / "ran"))
    for chosen in (arrays, [file for file in files if file not in arrays]):
        kept = {file: file.read_bytes() for file in chosen}
        for file in chosen:
            file.write_bytes(payload)
        with _nothing_runs(tmp_path / "ran"), contextlib.suppress(UserError):
            armd.load(run)
        for file, content in kept.items():
            file.write_bytes(content)
    assert armd.load(run).config.num_layers == 2


def test_other_files_beside_a_model_are_not_opened(tmp_path, export, run):
    """Pickles, object arrays and Python files under every name that other tools would run are left alone."""
    program = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
    for folder in (pathlib.Path(shutil.copytree(export, tmp_path / "export")), run):
        payload = pickle.dumps(_Payload(tmp_path / "ran"))
        for name in ("model.pkl", "pytorch_model.bin", "params.npy", "checkpoints.pt", "tokenizer/tokenizer.pkl"):
            (folder / name).write_bytes(payload)
        np.save(folder / "array.npy", np.array([_Payload(tmp_path / "ran")], object), allow_pickle=True)
        for name in ("__init__.py", "config.py", "modeling.py", "conftest.py", "tokenizer/tokenizer.py"):
            (folder / name).write_text(program)
        about = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
        about |= {"auto_map": {"AutoTokenizer": ["tokenizer.py", None]}, "tokenizer_class": "../tokenizer.Tokenizer"}
        (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(about))
        with _nothing_runs(tmp_path / "ran"):
            assert armd.load(folder).tokenizer.encode("a") == [97]


@pytest.mark.parametrize(
    "change",
    [
        {"__reduce__": ["os.mkdir", ["ran"]]},
        {"py/reduce": [{"py/function": "os.mkdir"}, ["ran"]]},
        {"model": {"__class__": "os.mkdir", "width": 32}},
        {"model": {"mlp": "__import__('os').mkdir('ran')"}},
        {"model": {"dtype": "!!python/object/apply:os.mkdir ['ran']"}},
        {"model": {"width": {"__reduce__": ["os.mkdir", ["ran"]]}}},
        {"_target_": "os.mkdir", "path": "ran"},
    ],
)
def test_a_stored_config_is_only_data(tmp_path, monkeypatch, export, change):
    """What other loaders would build or call is an unknown field or a wrong value here."""
    monkeypatch.chdir(tmp_path)
    folder = pathlib.Path(shutil.copytree(export, tmp_path / "export"))
    (folder / "config.json").write_text(json.dumps(change))
    with _nothing_runs(tmp_path / "ran"), pytest.raises(UserError, match=r"config\.json: "):
        armd.load(folder)


def test_a_vocabulary_is_only_text(tmp_path):
    """Hostile words are words; saving writes the known file names and nothing else."""
    words = [
        "[UNK]",
        "[SEP]",
        "../../escape",
        "__import__('os').mkdir('ran')",
        "{{7*7}}",
        "$(mkdir ran)",
        "/etc/passwd",
    ]
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(words) + "\n")
    with _nothing_runs(tmp_path / "ran"):
        tokenizer = tokenizers.load(tmp_path / "words")
        assert [tokenizer.token_text(token) for token in range(len(words))] == words
        tokenizer.save(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {"vocab.txt", "tokenizer_config.json"}


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "os.mkdir", "vocab": {"a": 0}, "merges": []}},
        {"model": {"type": "BPE", "vocab": "/etc/passwd", "merges": "/etc/passwd"}},
        {"pre_tokenizer": {"type": "Custom", "__reduce__": ["os.mkdir", ["ran"]]}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/etc/passwd"}},
        {"decoder": {"type": "__import__('os').mkdir('ran')"}},
        {"added_tokens": [{"id": -1, "content": "../../escape"}]},
        {"added_tokens": "os.mkdir"},
        {"model": [{"__class__": "os.mkdir"}]},
    ],
)
def test_a_tokenizer_json_is_only_data(tmp_path, monkeypatch, change):
    """What names something else than a component of the library is an error of one line."""
    monkeypatch.chdir(tmp_path)
    pieces = {"<|endoftext|>": 0, "a": 1}
    plain = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": pieces, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    assert tokenizers.load(tmp_path).encode("a") == [1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain | change))
    with _nothing_runs(tmp_path / "ran"), pytest.raises(UserError, match="tokenizer"):
        tokenizers.load(tmp_path)


def test_a_vocabulary_names_no_file(tmp_path):
    """The library takes a text in place of a vocabulary for the name of a file."""
    (tmp_path / "vocab.json").write_text('"/etc/passwd"')
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(UserError, match="vocab.json is not a JSON object"):
        tokenizers.load(tmp_path)


def test_saving_does_not_write_through_links(tmp_path):
    """A workdir from elsewhere may hold links: what they point at stays as it is."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").symlink_to(tmp_path / "precious")
    tokenizers.BytesTokenizer().save(tmp_path / "tokenizer")
    assert (tmp_path / "precious").read_text() == "precious"
    assert tokenizers.load(tmp_path / "tokenizer").kind == "bytes"


@pytest.fixture
def prepared(tmp_path: pathlib.Path, smoke_run: pathlib.Path) -> pathlib.Path:
    """A copy of the data of the smoke run, beside a file of rows that does not belong to it."""
    (folder,) = (smoke_run / "data").iterdir()
    copy = pathlib.Path(shutil.copytree(folder, tmp_path / "prepared"))
    shutil.copy(copy / "test-00000.array_record", tmp_path / "test-00000.array_record")
    return copy


def test_a_link_as_a_shard_is_not_followed(tmp_path, prepared):
    """Rows that a link would bring from elsewhere are not read, though they are the very same bytes."""
    shard = prepared / "test-00000.array_record"
    assert packing.open_prepared(prepared).num_rows("test") > 0
    for target in (tmp_path / "test-00000.array_record", pathlib.Path("..") / "test-00000.array_record"):
        shard.unlink()
        shard.symlink_to(target)
        assert shard.is_file()
        with pytest.raises(UserError, match="test-00000.array_record: this shard is a link out of its folder"):
            packing.open_prepared(prepared)


@pytest.mark.parametrize("name", ["../test-00000.array_record", "ABSOLUTE", "tokenizer/../test-00000.array_record"])
def test_a_path_as_the_name_of_a_shard_is_refused(tmp_path, prepared, name):
    """A manifest names files of its folder. A name with a folder in it is an error, whatever lies there."""
    name = name.replace("ABSOLUTE", str(tmp_path / "test-00000.array_record"))
    assert (prepared / name).is_file()
    about = json.loads((prepared / "manifest.json").read_text())
    about["splits"]["test"]["shards"][0]["file"] = name
    (prepared / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"manifest.json: .*is not the name of a shard"):
        packing.open_prepared(prepared)


@pytest.mark.slow
def test_a_run_does_not_choose_where_evaluation_writes(tmp_path, run):
    """`data.cache_dir` of a run that came from elsewhere is read where it is there, and never made or written to."""
    values = json.loads((run / "config.json").read_text())
    values["data"]["cache_dir"] = str(tmp_path / "elsewhere")
    (run / "config.json").write_text(json.dumps(values))
    events = (run / "events.jsonl").read_text().splitlines()  # they say where the rows were, on the other machine
    there = [json.dumps({name: value for name, value in json.loads(row).items() if name != "rows"}) for row in events]
    (run / "events.jsonl").write_text("".join(row + "\n" for row in there))
    assert cli.main(["eval", f"--run={run}", "--streams=2", "--draws=0"]) == 0
    assert not (tmp_path / "elsewhere").exists() and len(list((run / "data").iterdir())) == 1
    assert (run / "eval.json").exists()
    (folder,) = (run / "data").iterdir()
    (folder / "baselines.json").unlink()
    shutil.move(run / "data", tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    assert cli.main(["eval", f"--run={run}", "--streams=2", "--draws=0"]) == 0
    assert not (run / "data").exists() and sorted((tmp_path / "elsewhere").rglob("*")) == before
    assert (run / "baselines.json").exists()
