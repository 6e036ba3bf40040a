"""Every mistake a user can make is one line `error: …` with the reason, exit code 2, and not a byte changed on disk."""

import gzip
import hashlib
import json
import os
import pathlib
import pickle
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from armd_jax.cli import main as cli

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEEP = "[" * 100_000
LATIN = "sm\u00f8rrebr\u00f8d".encode("latin-1")

# Files of the folder that all commands run in.
FILES: dict[str, str | bytes] = {
    "file": "",
    "empty.txt": "",
    "blank.txt": " \n\n\t\n",
    "short.txt": "too short for one row of sixty-four tokens of one byte\n",
    "latin.txt": b"fine\n" + LATIN,
    "binary.txt": b"fine\nfine\n\0\1\2",
    "picture.png": b"\x89PNG",
    "broken.jsonl": '{"text": "fine"}\n{"text": \n',
    "deep.jsonl": '{"text": "fine"}\n' + DEEP,
    "body.jsonl": '{"body": "fine"}\n',
    "number.jsonl": '{"text": 3}\n',
    "half.jsonl": '{"text": "\\ud800"}\n',
    "cut.jsonl.gz": gzip.compress(b'{"text": "fine"}\n' * 5000)[:-20],
    "plain.txt.gz": "not gzipped",
    "splits/train.txt": "words " * 100,
    "splits/test.txt": "words " * 100,
    "splits/notes.txt": "words " * 100,
    "silent/train.txt": "words " * 100,
    "silent/test.txt": "\n",
    "notes.md": "words",
    "syntax.py": "def get_config(:",
    "raises.py": "def get_config(arg=''):\n    raise KeyError('no such thing')\n",
    "exits.py": "import sys\nsys.exit(0)\n",
    "silent.py": "x = 3\n",
    "dict.py": "def get_config(arg=''):\n    return {}\n",
    "field.py": "from armd_jax.config import default_config_dict\n"
    "def get_config(arg=''):\n    c = default_config_dict()\n    c.model.widht = 3\n    return c\n",
    "none.py": "from armd_jax.config import default_config_dict\n"
    "def get_config(arg=''):\n    c = default_config_dict()\n    c.model.width = None\n    return c\n",
    "vocab/none/readme.txt": "",
    "vocab/json/vocab.json": "{",
    "vocab/json/merges.txt": "",
    "vocab/list/vocab.json": "[1, 2]",
    "vocab/list/merges.txt": "",
    "vocab/deep/vocab.json": DEEP,
    "vocab/deep/merges.txt": "",
    "vocab/gaps/vocab.json": '{"a": 5, "<|endoftext|>": 0}',
    "vocab/gaps/merges.txt": "",
    "vocab/end/vocab.txt": "[UNK]\nhello\n",
    "vocab/twice/vocab.txt": "[UNK]\n[SEP]\nhello\nhello\n",
    "vocab/latin/vocab.txt": b"[UNK]\n[SEP]\n" + LATIN,
    "vocab/junk/tokenizer.model": "junk",
    "vocab/empty/tokenizer.model": "",
    "vocab/two/a.model": "",
    "vocab/two/b.model": "",
    "vocab/kind/tokenizer_config.json": '{"kind": "bytes"}',
    "vocab/kind/vocab.txt": "[UNK]\n[SEP]\nhello\n",
    "sweep.py": "from armd_jax.config import default_config_dict\nfrom armd_jax.sweeps import Sweep, seeds\n"
    "def get_sweep(arg=''):\n    return Sweep(default_config_dict(), seeds(2), ('eval --no-such',) if arg else ())\n",
    "run-of-nothing/readme.txt": "",
    "run-cut-config/config.json": "{",
    "run-list-config/config.json": "[]",
    "run-latin-config/config.json": LATIN,
    "run-deep-config/config.json": DEEP,
    "run-odd-config/config.json": '{"model": 3}',
    "run-unknown-config/config.json": '{"model": {"widht": 3}}',
    "run-large-config/config.json": '{"optimizer": {"learning_rate": 1%s}}' % ("0" * 400),
    "prepared-cut/manifest.json": "{",
    "prepared-old/manifest.json": '{"format": 1}',
}


def _edit(file: pathlib.Path, **model: object) -> None:
    values = json.loads(file.read_text())
    values["model"].update(model)
    file.write_text(json.dumps(values))


def _write_exports(place: pathlib.Path) -> None:
    """`export`, and copies of it that are each broken in one way."""
    weights = "model.safetensors"
    assert cli.main(["export", f"--run={place / 'run'}", f"--out={place / 'export'}"]) == 0
    flat = safetensors.numpy.load_file(place / "export" / weights)

    def copy(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(place / "export", place / f"export-{name}"))

    def with_tensors(name: str, tensors: dict[str, np.ndarray]) -> None:
        safetensors.numpy.save_file(tensors, copy(name) / weights)

    cut = copy("cut") / weights
    cut.write_bytes(cut.read_bytes()[:1000])
    (copy("pickle") / weights).write_bytes(pickle.dumps(flat))
    (copy("header") / weights).write_bytes(b"\xff" * 8 + b"{}")
    with_tensors("missing", {name: value for name, value in flat.items() if name != "start"})
    with_tensors("extra", flat | {"../../escape": flat["start"]})
    with_tensors("shape", flat | {"embedding": flat["embedding"].T.copy()})
    with_tensors("whole", flat | {"start": flat["start"].astype(np.int32)})
    with_tensors("half", flat | {"start": flat["start"].astype(np.float16)})
    _edit(copy("layers") / "config.json", num_layers=2**31 - 1)
    _edit(copy("width") / "config.json", width=64)
    _edit(copy("vocabulary") / "config.json", vocab_size=200)
    _edit(copy("more-vocabulary") / "config.json", vocab_size=300)
    shutil.rmtree(copy("tokenizer") / "tokenizer")
    shutil.rmtree(copy("weights") / "checkpoints", ignore_errors=True)
    (place / "export-weights" / weights).unlink()


def _write_runs(place: pathlib.Path) -> None:
    """Copies of `run` that are each broken in one way."""

    def copy(name: str, without: str) -> pathlib.Path:
        ignore = shutil.ignore_patterns(without, "data")
        return pathlib.Path(shutil.copytree(place / "run", place / f"run-{name}", ignore=ignore))

    copy("without-checkpoints", "checkpoints")
    copy("without-tokenizer", "tokenizer")
    (copy("with-empty-checkpoints", "checkpoints") / "checkpoints").mkdir()
    for file in (copy("damaged", "tensorboard") / "checkpoints").rglob("*"):
        if file.is_file() and "state" in file.parts:
            file.write_bytes(file.read_bytes()[:3])
    _edit(copy("foreign", "tensorboard") / "config.json", width=64)
    _edit(copy("other-vocabulary", "tensorboard") / "config.json", vocab_size=200)
    (copy("odd-scores", "checkpoints") / "eval.json").write_text(
        '{"split": "test", "lossless": true, "left_to_right": 3}'
    )
    (copy("cut-scores", "checkpoints") / "eval.json").write_text("{")
    for folder in ("shard", "manifest", "link"):
        shutil.copytree(place / "run", place / f"run-{folder}", ignore=shutil.ignore_patterns("tensorboard"))
        (data,) = (place / f"run-{folder}" / "data").iterdir()
        if folder == "shard":
            shard = next(data.glob("test-*"))
            shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
        elif folder == "manifest":
            text = (data / "manifest.json").read_text()
            (data / "manifest.json").write_text(text.replace('"test-00000.array_record"', '"../../../text.jsonl"'))
        else:
            shard = next(data.glob("test-*"))
            shard.rename(place / "elsewhere.array_record")
            shard.symlink_to(place / "elsewhere.array_record")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, smoke_run: pathlib.Path, corpus: pathlib.Path) -> pathlib.Path:
    """The folder that the commands run in: good and bad files, vocabularies, runs and exports. No row changes it."""
    place = tmp_path_factory.mktemp("place")
    for name, content in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (place / "nothing").mkdir()
    shutil.copy(corpus, place / "text.jsonl")
    newest = max(map(int, (path.name for path in (smoke_run / "checkpoints").iterdir() if path.name.isdigit())))
    older = [str(step) for step in range(newest)]
    shutil.copytree(smoke_run, place / "run", ignore=shutil.ignore_patterns("tensorboard", *older))
    _write_exports(place)
    _write_runs(place)
    return place


TRAIN = "train --config={smoke} --workdir=new --config.data.path=text.jsonl "
AGAIN = "train --config={smoke} --workdir=run --config.data.path={corpus} "

# What is typed, and what the one line must say.
COMMAND_LINES = [
    ("", r"required: VERB"),
    ("trian --config={smoke}", r"invalid choice: 'trian'"),
    ("train --workdir=new", r"required: --config"),
    ("sweep --config=sweep.py", r"required: --out"),
    ("sweep --config=sweep.py --out=", r"--out: expected the name of a folder"),
    ("sweep --config=missing.py --out=new", r"there is no file 'missing.py'"),
    ("sweep --config={smoke} --out=new", r"the file defines no get_sweep\(arg\)"),
    ("sweep --config=raises.py --out=new", r"defines no get_sweep"),
    ("sweep --config=sweep.py --out=file", r"--out=.*file: is a file, not a folder"),
    ("sweep --config=sweep.py --out=run", r"--out=.*run: holds other files and no sweep"),
    ("sweep --config=sweep.py --out=new --jobs=0", r"--jobs=0: must be at least 1"),
    ("sweep --config=sweep.py --out=new --rate=1e9", r"--rate belongs to --list"),
    ("sweep --config=sweep.py --out=new --launcher=slurm --jobs=2", r"--jobs: a launcher submits every training"),
    ("sweep --config=sweep.py --out=new --list --rate=0", r"--rate=0.0: must be a number of FLOPs per second"),
    ("sweep --config=sweep.py --out=new --only=x", r"--only=x: no member; known: seed=0, seed=1"),
    ("sweep --config=sweep.py --out=new --submit", r"belong to --launcher"),
    ("sweep --config=sweep.py --out=new --launcher=slrum", r"invalid choice: 'slrum'"),
    ("sweep --config=sweep.py --out=new --list --launcher=gke", r"--list runs nothing"),
    ("sweep --config=sweep.py --out=new --config.training.seed=1", r"the members of the sweep set training.seed"),
    ("sweep --config=sweep.py --out=new --config.model.width=0", r"member seed=0: model.width=0: must be at least 1"),
    ("sweep --config=sweep.py:x --out=new", r"after='eval --no-such': unknown argument '--no-such'"),
    ("train --config={smoke}", r"required: --workdir"),
    ("train --config={smoke} --workdir=", r"--workdir: expected the name of a folder"),
    ("train --config= --workdir=new", r"no file ''"),
    ("train --config=missing.py --workdir=new", r"no file 'missing.py'"),
    ("train --config=nothing --workdir=new", r"no file 'nothing'"),
    ("train --config=notes.md --workdir=new", r"'notes.md' is not a Python file"),
    ("train --config={smoke}x --workdir=new", r"experiment argument 'smokex' is not known"),
    ("train --config=syntax.py --workdir=new", r"fails with SyntaxError"),
    ("train --config=raises.py --workdir=new", r"get_config fails with KeyError: 'no such thing'"),
    ("train --config=exits.py --workdir=new", r"fails with SystemExit"),
    ("train --config=silent.py --workdir=new", r"defines no get_config"),
    ("train --config=dict.py --workdir=new", r"must return an ml_collections.ConfigDict"),
    ("train --config=field.py --workdir=new", r"widht"),
    ("train --config=none.py --workdir=new", r"model.width=None: expected int"),
    (f"train --config={'x' * 5000}.py --workdir=new", r"File name too long"),
    (TRAIN + "--bogus=1", r"unknown argument '--bogus=1'"),
    (TRAIN + "extra", r"unknown argument 'extra'"),
    (TRAIN + "--config.model.width", r"'--config.model.width' has no value"),
    (TRAIN + "--config.model.width=8 stray", r"unknown argument 'stray'"),
    ("prepare --source=text.jsonl", r"required: --out"),
    ("prepare --source=text.jsonl --out=", r"--out: expected the name of a folder"),
    ("prepare --source=text.jsonl --out=new --length=long", r"--length: invalid int value: 'long'"),
    ("prepare --source=text.jsonl --out=new --length=0", r"max_length=0: must be at least 1"),
    ("prepare --source=text.jsonl --out=new --length=99999999999", r"model.max_length=99999999999: must be in"),
    ("prepare --source=text.jsonl --out=new --vocab-size=-3", r"data.vocab_size=-3"),
    ("prepare --source=text.jsonl --out=new --vocab-size=100 --length=16", r"data.vocab_size=100: .* alone need"),
    ("prepare --source=text.jsonl --out=new --config.model.width=3", r"unknown argument '--config.model.width=3'"),
    ("eval", r"required: --run"),
    ("eval --run=", r"--run: expected the name of a folder"),
    ("eval --run=run --split=nowhere", r"--split: invalid choice: 'nowhere'"),
    ("eval --run=run --streams=two", r"--streams='two': expected whole numbers"),
    ("eval --run=run --streams=0", r"--streams='0': expected whole numbers from 1"),
    ("eval --run=run --streams=3", r"--streams=3: 3 does not divide the 64 tokens of a row"),
    ("eval --run=run --batch=0", r"--batch at least 1"),
    ("eval --run=run --draws=-1", r"--draws must be at least 0"),
    ("eval --run=run --orders=0", r"--orders=0: must be at least 1"),
    ("eval --run=run --orders=2 --rows=0", r"--rows=0: must be at least 1"),
    ("eval --run=run --rows=2", r"--rows belongs to --orders=K"),
    ("eval --run=run --shuffled=2", r"--shuffled belongs to --orders=K"),
    ("eval --run=run --orders=2 --shuffled=65", r"--shuffled=65: a row has model.max_length=64 tokens"),
    ("eval --run=run --tasks=own --draws=0", r"--draws does not go together with --tasks"),
    ("eval --run=run --limit=0", r"--limit belongs to --tasks"),
    ("eval --run=run --tasks=own --price", r"--price does not go together with --tasks"),
    ("eval --run=run --tasks=own --orders=2", r"--orders does not go together with --tasks"),
    ("eval --run=run --seed=-1", r"--seed=-1: must be in"),
    ("eval --run=run --seed=99999999999999999999", r"--seed=9+: must be in"),
    ("eval --run=run --data=", r"--data is empty"),
    ("eval --run=run --data=missing.txt", r"'missing.txt': there is no such file"),
    ("eval --run=run --data=latin.txt", r"latin.txt, line 2: not UTF-8"),
    ("eval --run=run --data=silent", r"no text for the test split"),
    ("eval --run=run --samples=3", r"--samples belongs to --judge"),
    ("eval --run=run --judge=run --split=test", r"--split does not go together with --judge"),
    ("eval --run=run --judge=run --no-baselines", r"--no-baselines does not go together with --judge"),
    ("eval --run=run --judge=run --tasks=own", r"--tasks and --judge are two evaluations"),
    ("eval --run=run --judge=missing", r"--judge=missing: there is no such folder or file"),
    ("eval --run=run --judge=run-of-nothing", r"run-of-nothing: "),
    ("eval --run=run --judge=run --temperatures=warm", r"--temperatures='warm': expected numbers"),
    ("eval --run=run --judge=run --temperatures=-1", r"--temperatures='-1': expected numbers"),
    ("eval --run=run --judge=run --modes=fast", r"--modes='fast' is not known"),
    ("eval --run=run --judge=run --modes=,", r"--modes=',': expected names"),
    ("eval --run=run --judge=run --samplers=ancestral", r"--samplers=ancestral: belongs to a denoiser"),
    ("eval --run=run --judge=run --length=65", r"--length=65: must be in 1 .. 64"),
    ("eval --run=run --judge=run --samples=0", r"--samples and --batch must be at least 1"),
    ("eval --run=run --judge=run --top-p=2", r"--top-p=2.0: must be in \(0, 1\]"),
    ("eval --run=run --judge=run --reference=missing.txt", r"--reference=missing.txt: .*there is no such file"),
    ("eval --run=run --out=file/new", r"--out=file/new: cannot be written \(Not a directory\)"),
    ("sample --run=run --out=file", r"--out=file: is a file, not a folder"),
    ("report --run=run --out=file", r"--out=file: is a file, not a folder"),
    (
        "compile --config={smoke} --topology=v5e:2x2 --dump-hlo=none/hlo",
        r"--dump-hlo=none/hlo: the folder none does not",
    ),
    ("export --run=run", r"required: --out"),
    ("export --run=run --out=export", r"exists already"),
    ("export --run=run --out=file/new", r"--out=file/new: cannot be written \(Not a directory\)"),
    ("checkpoints", r"required: --run"),
    ("checkpoints --run=missing", r"missing"),
    ("checkpoints --run=run-of-nothing", r"run-of-nothing"),
    ("checkpoints --run=run-cut-config", r"config.json"),
    ("checkpoints --run=run-without-checkpoints", r"checkpoints"),
    (TRAIN + "--distributed=maybe", r"--distributed: invalid choice: 'maybe'"),
    (TRAIN + "--num-processes=two", r"--num-processes: invalid int value: 'two'"),
    (TRAIN + "--distributed=on --num-processes=0", r"num-processes"),
    ("report", r"one of the arguments --run --sweep is required"),
    ("report --run=run --bogus", r"unknown argument '--bogus'"),
    ("profile --run=run --rows=0", r"--rows=0: must be at least 1"),
]

CONFIGS = [
    ("modle.width=3", r"unknown field 'modle.width'; did you mean 'model'"),
    ("model.widht=3", r"unknown field 'model.widht'; did you mean 'model.width'"),
    ("model.width.x=3", r"'model.width' is a single value"),
    ("model=3", r"a section; set one of its fields"),
    ("=3", r"unknown field ''"),
    ("model.width=", r"model.width='': expected int"),
    ("model.width=wide", r"model.width='wide': expected int"),
    ("model.width=1.5", r"model.width='1.5': expected int"),
    ("model.width=None", r"model.width='None': expected int"),
    ("model.width='{{[]: 1}}'", r"expected int"),
    ("model.width=" + "(" * 500, r"expected int"),
    ("model.width=0x" + "f" * 900, r"model.width: a number of 3600 bits: must be"),
    ("model.width=" + "9" * 2000, r"expected int"),
    ("model.width=0", r"model.width=0: must be at least 1"),
    ("model.width=-32", r"model.width=-32: must be at least 1"),
    ("model.num_heads=3", r"width=32 is not divisible by model.num_heads=3"),
    ("model.two_stream_layers=3", r"cannot exceed model.num_layers=2"),
    ("model.dropout=1.0", r"model.dropout=1.0: must be in \[0, 1\)"),
    ("model.dropout=1e999", r"must be a finite number"),
    ("model.tie_embeddings=maybe", r"expected true or false"),
    ("model.aggregator=sum", r"model.aggregator='sum' is not known"),
    ("model.attention=flesh", r"model.attention='flesh' is not known; did you mean 'flash'"),
    ("model.vocab_size=300", r"model.vocab_size=300, but the data's tokenizer has 257"),
    ("data.damaged=ignore", r"data.damaged='ignore' is not known; known: error, skip"),
    ("data.valid_fraction=1.5", r"data.valid_fraction=1.5"),
    ("data.shard_rows=0", r"data.shard_rows=0"),
    ("optimizer.learning_rate=0", r"learning_rate=0.0: must be above 0"),
    ("optimizer.learning_rate=1" + "0" * 400, r"learning_rate="),
    ("optimizer.schedule=cosin", r"did you mean 'cosine'"),
    ("order.kind=random", r"order.kind='random' is not known"),
    (
        "order.kind=masked_diffusion --config.order.weight=simple --config.order.noise_schedule=geometric",
        r"a single token",
    ),
    ("order.streams=1,3", r"not divisible by 3 streams"),
    ("order.streams=1,two", r"order.streams='1,two': expected whole numbers"),
    ("order.streams=()", r"needs at least one number"),
    ("order.mix=contigous:0.1", r"order.mix='contigous' is not known; did you mean 'contiguous'"),
    ("order.mix=uniform:0.1,contiguous", r"order.mix='contiguous': expected a kind of order and its share"),
    ("data.mixture=wiki:0.7,code", r"data.mixture='code': expected a prepared folder and its weight"),
    ("order.mix=uniform:0.5,contiguous:0.5", r"the shares add up to 1 and leave no steps"),
    ("order.kind=contiguous --config.order.max_block=65", r"max_block=65: cannot exceed model.max_length=64"),
    ("training.num_steps=0", r"training.num_steps=0"),
    ("training.num_steps=99999999999", r"training.num_steps=99999999999: must be"),
    ("training.seed=-1", r"training.seed=-1"),
    ("training.batch_size=0", r"training.batch_size=0: must be at least 1"),
    ("training.microbatches=3", r"batch_size=8 is not divisible by training.microbatches=3"),
    ("training.init_from=missing", r"missing"),
    ("training.init_from=run-of-nothing", r"neither a training run nor an export"),
    ("training.init_from=run --config.model.width=64", r"model.width is 32 there, 64 here"),
    ("mesh.data=0", r"mesh.data=0: must be at least 1"),
    ("mesh.data=7", r"devices"),
    ("mesh.fsdp=-1 --config.mesh.tensor=-1", r"only one axis may be -1"),
]

CORPORA = [
    ("missing.txt", r"'missing.txt': there is no such file"),
    ("'*.text'", r"no file there ends in"),
    ("nothing", r"no file there ends in"),
    ("picture.png", r"cannot read this kind of file"),
    ("empty.txt", r"no text for the train split"),
    ("blank.txt", r"no text for the train split"),
    ("short.txt", r"fewer than the 64 of one row"),
    ("latin.txt", r"latin.txt, line 2: not UTF-8 text \(byte 7\)"),
    ("binary.txt", r"binary.txt, line 3: holds a NUL"),
    ("broken.jsonl", r"broken.jsonl, line 2: not valid JSON"),
    ("deep.jsonl", r"deep.jsonl, line 2: not valid JSON"),
    ("body.jsonl", r"body.jsonl, line 1: no text in field 'text'"),
    ("number.jsonl", r"number.jsonl, line 1: no text in field 'text'"),
    ("half.jsonl", r"half.jsonl, line 1: holds half a surrogate pair"),
    ("cut.jsonl.gz", r"cut.jsonl.gz, after line \d+: damaged or truncated gzip"),
    ("plain.txt.gz", r"plain.txt.gz: damaged or truncated gzip"),
    ("splits", r"'notes.txt' names no split"),
    ("silent", r"no text for the test split"),
    ("tfds:nothing_here", r"no dataset that can be read"),
]

TOKENIZERS = [
    ("sentencepeace", r"data.tokenizer='sentencepeace': neither a kind"),
    ("file", r"data.tokenizer='file': neither a kind"),
    ("vocab/none", r"vocab/none holds no tokenizer"),
    ("vocab/json", r"vocab/json: the vocabulary files cannot be read"),
    ("vocab/list", r"vocab/list: the vocabulary files cannot be read"),
    ("vocab/deep", r"vocab/deep: the vocabulary files cannot be read"),
    ("vocab/gaps", r"the ids of the vocabulary are not 0 .. 1"),
    ("vocab/end", r"the vocabulary has no \[SEP\]"),
    ("vocab/twice", r"the ids of the vocabulary are not"),
    ("vocab/latin", r"vocab/latin: the vocabulary files cannot be read"),
    ("vocab/junk", r"tokenizer.model is not a sentencepiece model"),
    ("vocab/empty", r"tokenizer.model is not a sentencepiece model"),
    ("vocab/two", r"vocab/two holds no tokenizer"),
    ("vocab/kind", r"says kind 'bytes' but the files are 'wordpiece'"),
]

RUNS = [
    ("missing", r"missing: there is no such folder"),
    ("file", r"file: there is no such folder"),
    ("nothing", r"neither a training run nor an export"),
    ("run-of-nothing", r"neither a training run nor an export"),
    ("run-cut-config", r"config.json: cannot be read as JSON"),
    ("run-list-config", r"config=\[\]: expected a section with fields, got list"),
    ("run-latin-config", r"config.json: cannot be read as JSON"),
    ("run-deep-config", r"config.json: .* nested too deeply"),
    ("run-odd-config", r"model=3: expected a section with fields"),
    ("run-unknown-config", r"unknown field 'model.widht'; did you mean 'model.width'"),
    ("run-large-config", r"learning_rate: a number of 13\d\d bits"),
    ("run-without-checkpoints", r"has no checkpoints yet"),
    ("run-with-empty-checkpoints", r"has no checkpoints yet"),
    ("run-without-tokenizer", r"tokenizer"),
    ("run-other-vocabulary", r"tokenizer has 257 tokens, its config.json says model.vocab_size=200"),
    ("run-damaged", r"none of the checkpoints"),
    ("run-foreign", r"none of the checkpoints"),
    ("export-weights", r"has no checkpoints yet"),
    ("export-tokenizer", r"tokenizer"),
    ("export-cut", r"model.safetensors: cannot be read"),
    ("export-pickle", r"model.safetensors: cannot be read"),
    ("export-header", r"model.safetensors: cannot be read"),
    ("export-missing", r"does not fit its config.json: start has shape None"),
    ("export-extra", r"does not fit its config.json: ../../escape has shape"),
    ("export-shape", r"does not fit its config.json: embedding has shape \(32, 257\)"),
    ("export-whole", r"start is I32, expected F32"),
    ("export-half", r"start is F16, expected F32"),
    ("export-layers", r"has 2 layers, its config.json says model.num_layers=2147483647"),
    ("export-width", r"does not fit its config.json"),
    ("export-vocabulary", r"tokenizer has 257 tokens, its config.json says model.vocab_size=200"),
    ("export-more-vocabulary", r"does not fit its config.json"),
]

PROMPTS = [
    ("--streams=65", r"streams=65 exceeds the 64 positions left to generate"),
    ("--streams=", r"--streams='': expected whole numbers"),
    ("--streams=1,x", r"--streams='1,x': expected whole numbers"),
    ("--streams=0", r"expected whole numbers from 1"),
    ("--streams=128", r"streams=128"),
    ("--batch=0", r"batch=0: must be at least 1"),
    ("--batch=many", r"--batch: invalid int value"),
    ("--length=0", r"length=0: must be in 1 .. 64"),
    ("--length=65", r"length=65: must be in 1 .. 64"),
    ("--temperature=-1", r"temperature=-1.0: must be 0 \(greedy\) or a positive number"),
    ("--temperature=nan", r"temperature=nan"),
    ("--temperature=inf", r"temperature=inf"),
    ("--temperature=hot", r"--temperature: invalid float value"),
    ("--top-k=0", r"top_k=0: must be at least 1"),
    ("--top-k=1.5", r"--top-k: invalid int value"),
    ("--top-p=0", r"top_p=0.0: must be in \(0, 1\]"),
    ("--top-p=1.01", r"top_p=1.01: must be in \(0, 1\]"),
    ("--top-p=nan", r"top_p=nan"),
    ("--seed=-1", r"seed=-1: must be in"),
    ("--seed=99999999999999999999", r"seed=9+: must be in"),
    (f"--prompt={'a' * 65}", r"65 \+ 0 tokens are longer than length=64"),
    (f"--prompt={'a' * 40} --suffix={'b' * 40}", r"40 \+ 40 tokens are longer than length=64"),
    (f"--prompt={'a' * 62} --streams=4", r"streams=4 exceeds the 2 positions"),
    ("--prompt=\udcff\udcfe", r"--prompt='\\udcff\\udcfe': is not UTF-8 text"),
]

OTHER_FILES = [
    ("prepare --source=text.jsonl --out=file", r"file is a file"),
    ("prepare --source=text.jsonl --out=file/new --length=16 --tokenizer=bytes", r"cannot write prepared data"),
    ("prepare --source=text.jsonl --out=splits", r"not empty and holds no prepared data"),
    ("prepare --source=text.jsonl --out=prepared-cut", r"manifest.json: damaged manifest"),
    ("prepare --source=text.jsonl --out=prepared-old", r"manifest.json: format 1 is not the"),
    ("prepare --source=missing.txt --out=new", r"there is no such file"),
    ("prepare --source=latin.txt --out=new", r"latin.txt, line 2"),
    ("prepare --source=latin.txt --out=new --skip-damaged", r"no text for the train split \(1 damaged"),
    ("prepare --source=body.jsonl --out=new --text-field=content", r"no text in field 'content'"),
    ("prepare --source=text.jsonl --out=new --tokenizer=vocab/junk", r"not a sentencepiece model"),
    ("train --config={smoke} --workdir=file --config.data.path=text.jsonl", r"--workdir=.*file"),
    ("train --config={smoke} --workdir=file/new --config.data.path=text.jsonl", r"--workdir=.*file/new"),
    ("train --config={smoke} --workdir=run-cut-config --config.data.path=text.jsonl", r"config.json: cannot be read"),
    ("train --config={smoke} --workdir=nothing --config.data.path=text.jsonl --config.mesh.data=7", r"devices"),
    (AGAIN + "--config.model.width=64", r"model.width was 32, now 64"),
    (AGAIN + "--config.training.seed=1", r"training.seed was 0, now 1"),
    (AGAIN + "--config.data.tokenizer=sentencepiece", r"data.tokenizer was 'bytes', now 'sentencepiece'"),
    (AGAIN + "--config.data.path=short.txt", r"data.path was .*, now 'short.txt'"),
    ("eval --run=run-cut-config", r"config.json: cannot be read as JSON"),
    ("eval --run=run-shard", r"test-00000.array_record: this shard is damaged"),
    ("eval --run=run-manifest", r"'../../../text.jsonl' is not the name of a shard"),
    ("eval --run=run-link", r"test-00000.array_record: this shard is a link out of its folder"),
    (AGAIN.replace("=run ", "=run-shard "), r"test-00000.array_record: this shard is damaged"),
    (AGAIN.replace("=run ", "=run-manifest "), r"is not the name of a shard"),
    ("profile --run=missing", r"missing: there is no such folder"),
    ("profile --run=nothing", r"neither a training run nor an export \(it has no config.json\)"),
    ("report --sweep=missing", r"missing: there is no such folder"),
    ("report --sweep=run", r"run: is not the folder of a sweep \(it has no sweep.json\)"),
    ("report --run=run --baseline=x", r"--baseline is for the report of a sweep, and needs --sweep=DIR"),
    ("report --run=missing", r"missing: there is no such folder"),
    ("report --run=nothing", r"neither a training run nor an export \(it has no config.json\)"),
    ("report --run=run-deep-config", r"cannot be read as JSON"),
    ("report --run=run-cut-scores", r"eval.json: cannot be read as JSON: .*; write it again with armd eval"),
    ("report --run=run-odd-scores", r"eval.json: not what armd eval writes: eval.left_to_right=3: .*; write it again"),
    ("export --run=run-of-nothing --out=new", r"neither a training run nor an export"),
    ("export --run=run-damaged --out=new", r"none of the checkpoints"),
]

TABLE = [
    *COMMAND_LINES,
    *((TRAIN + f"--config.{field}", reason) for field, reason in CONFIGS),
    *((TRAIN + f"--config.data.path={path}", reason) for path, reason in CORPORA),
    *((TRAIN + f"--config.data.tokenizer={name}", reason) for name, reason in TOKENIZERS),
    *((f"sample --length=8 --run={run}", reason) for run, reason in RUNS),
    *((f"sample --run=run {options}", reason) for options, reason in PROMPTS),
    *OTHER_FILES,
]

# Rows that also run as a process of their own.
REAL = [
    "trian --config={smoke}",
    "train --config=syntax.py --workdir=new",
    TRAIN + "--config.model.widht=3",
    TRAIN + "--config.model.width=wide",
    TRAIN + "--config.data.path=latin.txt",
    TRAIN + "--config.data.tokenizer=vocab/junk",
    "prepare --source=text.jsonl --out=file",
    "eval --run=run-cut-config",
    "sample --length=8 --run=export-pickle",
    "sample --run=run --prompt=\udcff\udcfe",
]


def _snapshot(place: pathlib.Path) -> dict[str, tuple]:
    """Every path below `place` with, for files, size, time of change and content."""
    found = {}
    for folder, folders, files in os.walk(place):
        found |= {os.path.join(folder, name): () for name in folders}
        for name in files:
            file = os.path.join(folder, name)
            about = os.lstat(file)
            with open(file, "rb") as content:
                digest = hashlib.file_digest(content, "sha1").hexdigest()
            found[file] = (about.st_size, about.st_mtime_ns, digest)
    return found


def _argv(line: str, smoke_config: str, corpus: pathlib.Path) -> list[str]:
    return shlex.split(line.format(smoke=smoke_config, corpus=corpus))


def _visible(stderr: str) -> list[str]:
    """What stays on a terminal, line by line: a carriage return goes back to the start of the line."""
    lines = []
    for line in stderr.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines += [shown.rstrip()] if shown.strip() else []
    return lines


def _assert_one_line(stderr: str, reason: str) -> None:
    """One line, which starts with `error:` and has the reason, is all that stays on the terminal."""
    lines = _visible(stderr)
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error:") and re.search(reason, lines[0]), lines[0]
    assert len(lines[0]) < 12_000


def test_the_table_is_large():
    """At least sixty different mistakes, ten of which also run as a real command."""
    assert len(TABLE) == len(dict(TABLE)) >= 60 and len(REAL) == len(set(REAL)) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(("line", "reason"), TABLE, ids=[f"{n}" for n in range(len(TABLE))])
def test_every_mistake_is_one_line(monkeypatch, capsys, place, smoke_config, corpus, line, reason):
    monkeypatch.chdir(place)
    before = _snapshot(place)
    capsys.readouterr()
    assert cli.main(_argv(line, smoke_config, corpus)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    _assert_one_line(err, reason)
    assert _snapshot(place) == before


@pytest.mark.slow
@pytest.mark.parametrize("line", REAL, ids=[f"{n}" for n in range(len(REAL))])
def test_the_real_command_says_the_same(place, smoke_config, corpus, line):
    before = _snapshot(place)
    command = [sys.executable, "-m", "armd_jax", *_argv(line, smoke_config, corpus)]
    root = pathlib.Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, b"")
    _assert_one_line(done.stderr.decode(), dict(TABLE)[line])
    assert _snapshot(place) == before


def test_a_mistake_in_the_config_prints_nothing_else(monkeypatch, capsys, place, smoke_config, corpus):
    """What can be seen from the command line alone is said before anything else is printed or read."""
    monkeypatch.chdir(place)
    for line in (TRAIN + "--config.model.widht=3", TRAIN + "--config.model.width=0", "sample --run=run --streams=x"):
        capsys.readouterr()
        assert cli.main(_argv(line, smoke_config, corpus)) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
