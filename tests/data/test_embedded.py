"""The embedded corpus: the same prose in every process, without repeats, and nothing of Python is imported for it."""

import os
import subprocess
import sys

import pytest

from armd_jax.data import embedded as embedded_module
from armd_jax.data.corpora import open_corpus
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError


@pytest.fixture(scope="module")
def embedded():
    corpus = open_corpus(DataConfig())
    return {split: list(corpus.documents(split)) for split in corpus.splits}


def test_embedded_corpus_is_sizeable_unique_and_split_by_share(embedded):
    documents = sum(embedded.values(), [])
    assert len(documents) > 200 and len(set(documents)) == len(documents)
    sizes = {split: sum(len(text.encode()) for text in part) for split, part in embedded.items()}
    assert sum(sizes.values()) > 1_000_000
    for split in ("valid", "test"):
        assert sizes[split] == pytest.approx(0.05 * sum(sizes.values()), rel=0.1)
    paragraphs = [" ".join(block.split()) for text in documents for block in text.split("\n\n")]
    long = [block for block in paragraphs if len(block) >= 200]
    assert len(long) > 1000 and len(set(long)) == len(long)  # no passage is both held out and trained on


@pytest.mark.slow
def test_embedded_corpus_does_not_depend_on_the_process_and_imports_nothing():
    program = (
        "import sys\n"
        "from armd_jax.data_config import DataConfig\n"
        "from armd_jax.data.corpora import open_corpus\n"
        "c = open_corpus(DataConfig())\n"
        "import hashlib\n"
        "print(c.fingerprint, [hashlib.sha256(repr(list(c.documents(s))).encode()).hexdigest() for s in c.splits])\n"
        "assert not {'this', 'antigravity', 'turtle', 'pydoc_data.topics'} & set(sys.modules)\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE
        )
        for seed in ("1", "2")
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert all(run.returncode == 0 for run in runs)
    assert first == second and len(first) > 100


def test_python_without_topics_or_sources_gives_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    read = embedded_module.embedded_documents.__wrapped__
    with pytest.raises(UserError, match="carries no documentation"):
        read()
    prose = "Some prose.\n\n    " + "Indented and long enough. " * 10
    (tmp_path / "module.py").write_text(f'import nothing\ndef f():\n    """{prose}\n\n      More.\n    """\n')
    (tmp_path / "template.py").write_text("class {{name}}:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text(f'"""Left out. {prose}"""')
    assert read() == (prose.replace("    ", "") + "\n\n  More.\n",)
