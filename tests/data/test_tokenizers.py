"""Tokenizers: lossless kinds return every string, no user text becomes end-of-text, files survive save and load."""

import json

import pytest
import sentencepiece
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from armd_jax import typed
from armd_jax.data import tokenizers
from armd_jax.data.corpora import open_corpus
from armd_jax.data.sentencepiece_training import train_model
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.names import NamedTokenizer, TokenizerKind

KINDS = typed.choices(TokenizerKind)
LOSSLESS = [kind for kind in KINDS if kind not in ("wordpiece",)]
HOSTILE = ["</s>", "<|endoftext|>", "[SEP]", "<s>", "<unk>", "<0x41>", "\u2581", "a\u2581\u2581 b", " \u2581 ", "\0"]
HOSTILE += [
    "  two  spaces  ",
    "\n\n\n",
    "\t\r\n",
    "\n    indented",
    "e\u0301 \u00c5 \ufb01",
    "\U0001f600\ufe0f",
    "\ufeff",
    "",
]
WORDS = ["[PAD]", "[UNK]", "[SEP]", "hello", "world", "##s", "cafe", ",", "!", "[", "]", "sep"]


@pytest.fixture(scope="module")
def corpus():
    return open_corpus(DataConfig())


@pytest.fixture(scope="module")
def bpe_folder(corpus, tmp_path_factory):
    """A small vocabulary in GPT-2's two files, made by the library's own trainer."""
    folder = tmp_path_factory.mktemp("bpe")
    trained = library.ByteLevelBPETokenizer(add_prefix_space=False)
    trained.train_from_iterator(
        list(corpus.documents("valid")), 600, special_tokens=["<|endoftext|>"], show_progress=False
    )
    trained.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def kinds(corpus, bpe_folder, tmp_path_factory):
    """A tokenizer of every kind."""
    words = tmp_path_factory.mktemp("wordpiece")
    (words / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    json_folder = tmp_path_factory.mktemp("tokenizer_json")
    trained = library.ByteLevelBPETokenizer(str(bpe_folder / "vocab.json"), str(bpe_folder / "merges.txt"))
    trained.save(str(json_folder / "tokenizer.json"))
    return {
        "sentencepiece": tokenizers.SentencePieceTokenizer(train_model(corpus.documents("train"), 1024)),
        "bpe": tokenizers.load(bpe_folder),
        "bytes": tokenizers.BytesTokenizer(),
        "wordpiece": tokenizers.load(words),
        "tokenizer_json": tokenizers.load(json_folder),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_held_out_document_comes_back(kinds, corpus, kind):
    documents = [text for split in ("valid", "test") for text in corpus.documents(split)]
    encoded = kinds[kind].encode_batch(documents)
    assert [kinds[kind].decode(ids) for ids in encoded] == documents
    assert [kinds[kind].encode(text) for text in documents[:3]] == encoded[:3]


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=150, deadline=None, database=None)
@given(text=st.text() | st.lists(st.sampled_from([*HOSTILE, "word", " ", "\n"])).map("".join))
def test_every_string_comes_back_and_is_never_end_of_text(kinds, kind, text):
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.lossless and tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids and all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_no_user_text_becomes_end_of_text(kinds, kind):
    tokenizer = kinds[kind]
    for text in HOSTILE:
        assert tokenizer.end_of_text not in tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.end_of_text]) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_join_to_the_same_ids(kinds, corpus, kind, monkeypatch):
    """Long documents are encoded in parts, and the ids must not depend on that."""
    monkeypatch.setattr(tokenizers, "CHUNK", 50)
    tokenizer = kinds[kind]
    for text in [*list(corpus.documents("test"))[:5], "a \n\n  b\n" * 200, " " * 500, "x" * 500, "\n" * 300]:
        chunks = list(tokenizer.chunks(text))
        assert "".join(chunks) == text and (len(chunks) > 2 or len(set(text)) == 1)
        assert sum(tokenizer.encode_batch(chunks), []) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_is_the_same_tokenizer(kinds, kind, tmp_path):
    tokenizer = kinds[kind]
    tokenizer.save(tmp_path / "new" / "saved")
    again = tokenizers.load(tmp_path / "new" / "saved")
    assert tokenizer.kind == kind
    for field in ("kind", "hash", "vocab_size", "end_of_text", "lossless"):
        assert getattr(again, field) == getattr(tokenizer, field)
    assert again.encode("Hello, worlds!") == tokenizer.encode("Hello, worlds!")
    assert len({other.hash for other in kinds.values()}) == len(kinds)


def test_wordpiece_lowercases_and_says_that_it_is_lossy(kinds):
    tokenizer = kinds["wordpiece"]
    assert tokenizer.encode("Hello, Caf\u00e9 worlds!") == [3, 7, 6, 4, 5, 8]
    assert tokenizer.decode(tokenizer.encode("Hello WORLDS")) == "hello worlds"
    assert not tokenizer.lossless and tokenizer.end_of_text == WORDS.index("[SEP]")


def test_token_text_shows_characters(kinds):
    for kind in LOSSLESS:
        tokenizer = kinds[kind]
        assert "".join(map(tokenizer.token_text, tokenizer.encode("The end\n of"))) == "The end\n of"
        assert all(isinstance(tokenizer.token_text(token), str) for token in range(tokenizer.vocab_size))
    assert kinds["sentencepiece"].token_text(kinds["sentencepiece"].encode("\t")[0]) == "<0x09>"


def test_broken_characters_decode_to_replacements(kinds):
    for kind in LOSSLESS:
        ids = kinds[kind].encode("\U0001f600")
        assert "\ufffd" in kinds[kind].decode(ids[:-1])


def test_sentencepiece_model_that_normalises_is_found_lossy(tmp_path):
    with (tmp_path / "other.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words to train on"] * 9), model_writer=model, vocab_size=40,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    tokenizer = tokenizers.load(tmp_path)
    assert not tokenizer.lossless
    # It may add a prefix to every text that it gets, so none is ever cut.
    assert list(tokenizer.chunks("words " * 50_000)) == ["words " * 50_000]


def test_load_says_what_is_wrong(tmp_path, bpe_folder):
    with pytest.raises(UserError, match="neither a kind .* nor a folder"):
        tokenizers.load(tmp_path / "missing")
    looked_for = r"looked for tokenizer.json, vocab.json \+ merges.txt .* vocab.txt .*\*\.model"
    with pytest.raises(UserError, match=looked_for):
        tokenizers.load(tmp_path)

    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file.replace("__", ".")).write_bytes(content)
        return tmp_path / name

    merges, vocab = (bpe_folder / "merges.txt").read_bytes(), (bpe_folder / "vocab.json").read_bytes()
    without_end = json.loads(vocab)
    without_end["not an end"] = without_end.pop("<|endoftext|>")
    for broken, message in (
        (folder("a", tokenizer__model=b"junk"), "not a sentencepiece model"),
        (folder("b", vocab__json=b"{", merges__txt=merges), "cannot be read"),
        (folder("c", vocab__json=b'{"a": 5, "<|endoftext|>": 0}', merges__txt=b""), "are not 0 .. 1"),
        (folder("d", vocab__json=json.dumps(without_end).encode(), merges__txt=merges), r"no <\|endoftext\|>"),
        (folder("e", vocab__txt=b"[UNK]\nhello\n"), r"no \[SEP\]"),
        (folder("g", vocab__json=vocab), "holds no tokenizer"),
        (folder("h", tokenizer__model=b"", other__model=b""), "holds no tokenizer"),
        (folder("f", tokenizer_config__json=b'{"kind": "bytes"}', vocab__txt=b"[UNK]\n[SEP]\n"), "says kind 'bytes'"),
    ):
        with pytest.raises(UserError, match=message):
            tokenizers.load(broken)


def test_a_run_or_a_prepared_folder_stands_for_its_tokenizer(kinds, tmp_path):
    """They have it in `tokenizer/`; a folder that is a tokenizer itself is taken for that."""
    for name, tokenizer in kinds.items():
        tokenizer.save(tmp_path / name / "tokenizer")
        assert tokenizers.load(tmp_path / name).hash == tokenizer.hash
        assert tokenizers.request_of(DataConfig(tokenizer=str(tmp_path / name))) == f"{name} {tokenizer.hash}"
    kinds["bytes"].save(tmp_path / "bpe")
    assert tokenizers.load(tmp_path / "bpe").kind == "bytes"


def test_request_tells_tokenizers_apart(bpe_folder):
    asked = [
        DataConfig(),
        DataConfig(vocab_size=99),
        DataConfig(tokenizer="bytes"),
        DataConfig(tokenizer=str(bpe_folder)),
    ]
    assert len({tokenizers.request_of(config) for config in asked}) == 4
    with pytest.raises(UserError, match="data.tokenizer='sentencepeace'"):
        tokenizers.request_of(DataConfig(tokenizer="sentencepeace"))


@pytest.mark.parametrize("kind", typed.choices(NamedTokenizer))
def test_every_kind_that_a_config_may_name_is_made(kind, tmp_path):
    """The names need no folder, and a message about an unknown one lists them."""
    config = DataConfig(tokenizer=kind, vocab_size=300)
    assert tokenizers.load_or_train(config, iter(["some text\n"] * 9)).kind == kind
    assert tokenizers.request_of(config).startswith(kind)
    with pytest.raises(UserError, match=rf"neither a kind \(.*{kind}.*\) nor a folder"):
        tokenizers.load(tmp_path / "missing")


def test_id_outside_the_vocabulary_has_no_text(kinds):
    """A pretrained model may have more ids than tokens and draw one of them: nothing breaks, and it shows as <id>."""
    for kind, tokenizer in kinds.items():
        ids, behind = tokenizer.encode("The end of"), tokenizer.vocab_size
        assert tokenizer.decode([behind, *ids[:1], behind + 200, *ids[1:], 10**6]) == tokenizer.decode(ids), kind
        assert tokenizer.decode([behind]) == "", kind
        assert (tokenizer.token_text(behind), tokenizer.token_text(10**6)) == (f"<{behind}>", "<1000000>"), kind
