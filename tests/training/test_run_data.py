"""The data of a run: known by what they hold, however the config spells where they are, and by one process alone."""

import dataclasses
import json
import os
import pathlib
import shutil

import pytest

from armd_jax import config as configs
from armd_jax import files
from armd_jax.config import Config
from armd_jax.data import embedded, packing, text_files, tokenizers
from armd_jax.errors import UserError
from armd_jax.training import run_data
from armd_jax.training import workdir as workdirs

LENGTH = 16


def _config(**data) -> Config:
    order = {"max_permuted": 1, "streams": (1, 2)}
    return configs.from_config_dict({"model": {"max_length": LENGTH}, "order": order, "data": data})


def _begin(workdir: pathlib.Path, config: Config) -> Config:
    """Makes the workdir that of a run with a checkpoint, as training does. Returns the resolved config."""
    data, resolved = run_data.prepare(config, workdir, progress=False)
    workdirs.begin(workdir, resolved, data, resumed=False)
    start = {"event": "start", "step": 0, "data": data.digest, "rows": str(data.folder.absolute())}
    files.append_json_line(workdir / "events.jsonl", start)
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    assert workdirs.begun(workdir) == resolved
    return resolved


@pytest.fixture
def place(tmp_path, monkeypatch, corpus):
    """The folder that everything happens in: a text, and a run on it in bytes. Paths are relative to it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus, "docs.jsonl")
    _begin(pathlib.Path("run"), _config(path="docs.jsonl", tokenizer="bytes"))
    return tmp_path


def _go_on(workdir: pathlib.Path, **data) -> tuple[packing.PreparedData, Config]:
    old = workdirs.begun(workdir)
    new = _config(**{"path": "docs.jsonl", "tokenizer": "bytes", **data})
    workdirs.check_continuation(old, new, workdir)
    found, config = run_data.prepare(new, workdir, old=old)
    workdirs.begin(workdir, config, found, resumed=True)
    return found, config


def _listing(folder: pathlib.Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


# What is done to the files before the run goes on, the fields of `data` that it goes on with, and the words about it.
SPELLINGS = {
    "a dot": ("", {"path": "./docs.jsonl"}, "data.path was 'docs.jsonl', now './docs.jsonl'"),
    "an absolute path": ("", {"path": "HERE/docs.jsonl"}, "data.path was 'docs.jsonl', now '/"),
    "a folder": ("mkdir d; mv docs.jsonl d", {"path": "d"}, "now 'd'"),
    "a glob": ("", {"path": "*.jsonl"}, "now '*.jsonl'"),
    "a moved file": ("mkdir d; mv docs.jsonl d", {"path": "d/docs.jsonl"}, "now 'd/docs.jsonl'"),
    "another name": ("mv docs.jsonl texts.jsonl", {"path": "texts.jsonl"}, "now 'texts.jsonl'"),
    "another compression": ("gzip docs.jsonl", {"path": "docs.jsonl.gz"}, "now 'docs.jsonl.gz'"),
    "another field": (
        "sed -i s/text/body/ docs.jsonl",
        {"text_field": "body"},
        "data.text_field was 'text', now 'body'",
    ),
    "a touched file": ("touch docs.jsonl", {}, ""),
    "a folder of the same tokenizer": ("", {"tokenizer": "run/tokenizer"}, "data.tokenizer was 'bytes', now 'run/tok"),
    "a vocabulary size that decides nothing": ("", {"vocab_size": 300}, "data.vocab_size was 2048, now 300"),
    "another size of shards": ("", {"shard_rows": 7}, "data.shard_rows was 8192, now 7"),
    "damage that is not there": ("", {"damaged": "skip"}, "data.damaged was 'error', now 'skip'"),
    "the run's own rows": ("mv run/data/* rows; rm docs.jsonl", {"path": "rows"}, "now 'rows'"),
    "another cache": ("mv run/data cache", {"cache_dir": "cache"}, ""),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_run_is_what_it_holds(place, capsys, name):
    """Where the same rows and the same tokenizer have another name now, the run goes on with them, and the line that
    says what changed comes once."""
    commands, fields, words = SPELLINGS[name]
    fields = {field: value.replace("HERE", str(place)) if field == "path" else value for field, value in fields.items()}
    run = pathlib.Path("run")
    before = workdirs.trained_on(run)
    assert os.system(commands or "true") == 0
    found, _ = _go_on(run, **fields)
    assert found.digest == before.digest
    lines = [line for line in capsys.readouterr().err.splitlines() if "goes on with" in line]
    assert len(lines) == bool(words) and all(words in line for line in lines)
    _go_on(run, **fields)
    assert "goes on with" not in capsys.readouterr().err


CHANGES = {
    "another text": ({"path": "other.jsonl"}, r"on other rows \(data.path was 'docs.jsonl', now 'other.jsonl'\)"),
    "a text that is too short": ({"path": "short.txt"}, r"on other rows \(data.path was .*now 'short.txt': "),
    "another division": ({"valid_fraction": 0.3}, r"on other rows \(data.valid_fraction was 0.05, now 0.3\)"),
    "another tokenizer": ({"tokenizer": "words"}, r"another tokenizer \(data.tokenizer was 'bytes', now 'words'\)"),
    "a tokenizer to be trained": (
        {"tokenizer": "sentencepiece"},
        r"another tokenizer \(data.tokenizer was 'bytes', now",
    ),
    "a misspelled path": ({"path": "dosc.jsonl"}, r"'dosc.jsonl': there is no such file"),
    "rows of another text": ({"path": "prep"}, r"on other rows \(data.path was 'docs.jsonl', now 'prep'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_content_is_refused(place, capsys, name):
    """With both values of the field that decides it, and the way to the run's own rows. Nothing new is left behind."""
    fields, message = CHANGES[name]
    pathlib.Path("other.jsonl").write_text(pathlib.Path("docs.jsonl").read_text().replace("river", "brook"))
    pathlib.Path("short.txt").write_text("short")
    pathlib.Path("words").mkdir()
    pathlib.Path("words/vocab.txt").write_text("[UNK]\n[SEP]\nriver\n")
    packing.prepare_into(_config(path="other.jsonl", tokenizer="bytes").data, LENGTH, place / "prep", progress=False)
    before = _listing(place)
    with pytest.raises(UserError, match=message) as raised:
        _go_on(pathlib.Path("run"), **fields)
    assert ("use another --workdir" in str(raised.value)) == ("dosc" not in message)
    assert _listing(place) == before


def test_the_way_that_the_error_shows_leads_on(place):
    """Where the text has changed under its old name, the run's own rows can be given in its place."""
    pathlib.Path("docs.jsonl").write_text(pathlib.Path("docs.jsonl").read_text().replace("river", "brook"))
    with pytest.raises(
        UserError, match=r"on other rows than .*; bring it back, or .*own rows, data.path='(.*)'"
    ) as raised:
        _go_on(pathlib.Path("run"))
    own = str(raised.value).rpartition("data.path='")[2].rstrip("'")
    found = _go_on(pathlib.Path("run"), path=own)[0]
    assert found.digest == workdirs.trained_on(pathlib.Path("run")).digest


def test_a_change_of_the_held_out_text_is_said(place, capsys):
    """It does not change what is trained, but figures of before and after it cannot be compared."""
    with open("docs.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")  # which falls to the test split
    found, _ = _go_on(pathlib.Path("run"))
    assert found.digest == workdirs.trained_on(pathlib.Path("run")).digest
    assert "the training rows are as before, but the held-out text has changed" in capsys.readouterr().err


def test_a_run_goes_on_without_its_text_and_its_vocabulary(place, capsys):
    """On another machine, the command of before goes on with the rows and the tokenizer that are in the run."""
    shutil.copytree("run/tokenizer", "vocabulary")
    fields = {"path": "docs.jsonl", "tokenizer": "vocabulary"}
    _begin(pathlib.Path("second"), _config(**fields))
    for gone in ("vocabulary", "docs.jsonl"):
        shutil.move(gone, "elsewhere-" + gone)
        found, _ = _go_on(pathlib.Path("second"), **fields)
        assert found.digest == workdirs.trained_on(pathlib.Path("second")).digest
        assert "the run goes on with its own rows in second/data/" in capsys.readouterr().err


def test_a_run_on_the_embedded_corpus_survives_another_python(tmp_path, monkeypatch):
    """Every version of Python carries another text. The run goes on with what it began with."""
    texts = tuple(f"The documentation of module {n}, in a few words.\n" for n in range(50))
    monkeypatch.setattr(embedded, "embedded_documents", lambda: texts)
    _begin(tmp_path / "run", _config(tokenizer="bytes"))
    monkeypatch.setattr(embedded, "embedded_documents", lambda: (*texts, "One more module, new in this version.\n" * 9))
    found, _ = _go_on(tmp_path / "run", path="")
    assert found.digest == workdirs.trained_on(tmp_path / "run").digest
    with pytest.raises(UserError, match=r"on other rows \(data.valid_fraction"):
        _go_on(tmp_path / "run", path="", valid_fraction=0.3)


def test_runs_of_earlier_versions_compare_names(place):
    """If a run does not say which rows it was trained on, other names may mean other rows."""
    (place / "run" / "events.jsonl").write_text('{"event": "start", "step": 0}\n')
    assert run_data.own_rows(place / "run", workdirs.begun(place / "run")) is None
    _go_on(pathlib.Path("run"))
    with pytest.raises(UserError, match=r"of other data \(data.path was 'docs.jsonl', now './docs.jsonl'\)"):
        _go_on(pathlib.Path("run"), path="./docs.jsonl")


def test_own_rows_are_found_wherever_they_lie(place):
    """In a run that was moved, in the cache of its config, and where they were at the last start; by their digest."""
    shutil.move("run", "moved")
    run, (name,) = place / "moved", os.listdir("moved/data")
    config = workdirs.begun(run)
    assert run_data.own_rows(run, config).folder == run / "data" / name
    # Other held-out rows beside the same training rows: the folder of the last start is meant.
    shutil.copytree(run / "data" / name, run / "data" / "0")
    assert run_data.own_rows(run, config).folder == run / "data" / name
    shutil.rmtree(run / "data" / "0")
    os.makedirs("run")
    shutil.move(run / "data", "run/data")
    assert run_data.own_rows(run, config).folder == place / "run" / "data" / name
    shutil.move("run/data", "cache")
    assert run_data.own_rows(run, config) is None
    cached = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=str(place / "cache")))
    assert run_data.own_rows(run, cached).folder == place / "cache" / name
    chosen = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(place / "cache" / name)))
    assert run_data.own_rows(run, chosen).folder == place / "cache" / name


def test_a_place_that_may_not_be_read_holds_no_rows(place, monkeypatch):
    """A run from another user may say that its rows are in that user's home."""
    (name,) = os.listdir("run/data")
    shutil.move("run/data", "cache")
    config = workdirs.begun(place / "run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir="cache"))
    is_file = pathlib.Path.is_file

    def refused(path: pathlib.Path) -> bool:
        if path.is_relative_to(place / "run" / "data"):
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(pathlib.Path, "is_file", refused)  # tests may run as root, whom no permission stops
    assert run_data.own_rows(place / "run", config).folder == pathlib.Path("cache") / name


def test_damaged_rows_of_a_run_are_named(place):
    (name,) = os.listdir("run/data")
    (place / "run" / "data" / name / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: damaged manifest"):
        run_data.own_rows(place / "run", workdirs.begun(place / "run"))


def test_a_prepared_folder_needs_no_text(place, monkeypatch):
    """Training on it opens no text, writes no rows into the run, and the resolved config says which tokenizer it is."""
    packing.prepare_into(_config(path="docs.jsonl", tokenizer="bytes").data, LENGTH, place / "prep", progress=False)
    os.remove("docs.jsonl")
    monkeypatch.setattr(run_data, "open_corpus", lambda *_: pytest.fail("text was opened"))
    resolved = _begin(place / "new", _config(path="prep"))
    assert (resolved.data.path, resolved.data.tokenizer, resolved.model.vocab_size) == ("prep", "prep/tokenizer", 257)
    assert sorted(os.listdir("new")) == ["checkpoints", "config.json", "events.jsonl", "tokenizer"]
    found, again = run_data.prepare(_config(path="prep"), place / "new", old=workdirs.begun(place / "new"))
    assert again == resolved and found.folder == pathlib.Path("prep")


def test_only_the_first_process_reads_text(place, monkeypatch):
    """The others open the folder that it names, compare what is in it, and prepare for themselves only where they
    cannot see it."""
    config = _config(path="docs.jsonl", tokenizer="bytes")
    told = []
    monkeypatch.setattr(run_data, "_from_first", lambda text: told.append(text) or told[0])
    first, resolved = run_data.prepare_together(config, place / "new", False, None)
    monkeypatch.setattr(run_data.jax, "process_index", lambda: 1)
    with monkeypatch.context() as patched:
        patched.setattr(packing, "open_corpus", lambda *_: pytest.fail("text was opened"))
        patched.setattr(text_files, "hash_file", lambda _: pytest.fail("text was hashed"))
        other, same = run_data.prepare_together(config, place / "new", False, None)
    assert (other.folder, other.digest, same) == (first.folder, first.digest, resolved)
    shutil.move(place / "new", place / "unseen")
    other, same = run_data.prepare_together(config, place / "another-disk", False, None)
    assert other.folder.parent == place / "another-disk" / "data" and other.digest == first.digest
    pathlib.Path("docs.jsonl").write_text(pathlib.Path("docs.jsonl").read_text().replace("river", "brook"))
    with pytest.raises(UserError, match="process 1: its rows in .* are not those of process 0"):
        run_data.prepare_together(config, place / "another-disk", False, None)


def test_weights_to_start_from_keep_their_vocabulary(place):
    """A pretrained model may have more ids than the tokenizer has tokens. A run that goes on needs no source."""

    def sized(config: Config, size: int) -> Config:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))

    plain = _config(tokenizer="bytes")
    tokenizer = tokenizers.BytesTokenizer()
    os.mkdir("source")
    pathlib.Path("source/config.json").write_text(configs.to_json(sized(plain, 300)))
    tuned = dataclasses.replace(plain, training=dataclasses.replace(plain.training, init_from="source"))
    begun = run_data.with_vocabulary(tuned, tokenizer)
    assert begun.model.vocab_size == run_data.with_vocabulary(begun, tokenizer).model.vocab_size == 300
    assert run_data.with_vocabulary(plain, tokenizer).model.vocab_size == 257
    assert run_data.with_vocabulary(plain, tokenizer).data.end_of_text == tokenizer.end_of_text == 256
    other_end = dataclasses.replace(plain, data=dataclasses.replace(plain.data, end_of_text=0))
    for config, has in (
        (sized(tuned, 257), "=257, but the weights to start from have 300; leave it at 0"),
        (sized(tuned, 301), "=301, but the weights to start from have 300; leave it at 0"),
        (sized(plain, 300), "=300, but the data's tokenizer has 257; leave it at 0"),
        (other_end, "data.end_of_text=0, but that of the data's tokenizer is 256; leave it at -1"),
    ):
        with pytest.raises(UserError, match=has):
            run_data.with_vocabulary(config, tokenizer)
    shutil.rmtree("source")
    assert run_data.with_vocabulary(tuned, tokenizer, old=begun) == begun
    with pytest.raises(UserError, match="source: there is no such folder"):
        run_data.with_vocabulary(tuned, tokenizer)
