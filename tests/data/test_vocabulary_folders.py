"""Vocabulary folders of every vintage: each gives the tokens of its own tokenizer, or is refused with the reason."""

import codecs
import copy
import dataclasses
import io
import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import sentencepiece
import tokenizers as library

from armd_jax.data import tokenizers
from armd_jax.errors import UserError

END = "<|endoftext|>"
SENTENCES = [
    "The old river moves slowly under a stone bridge",
    "It's 1,234.50 degrees, I'LL say; we've seen 99% of them",
    "Déjà vu: naïve façade, Straße, Ångström",
    "De\u0301ja\u0300 vu with combining accents, \ufb01ne ligatures",
    "Старая река течёт МеДЛЕННО",
    "Η γρήγορη αλεπού",
    "النهر القديم يجري ببطء",
    "पुरानी नदी धीरे बहती है",
    "古老的河流在石桥下缓缓流动。",
    "古い川がユックリと流れる",
    "오래된 강이 천천히 흐른다",
    "แม่น้ำเก่าไหลช้า",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 emoji \u2764\ufe0f",
    "def f(x):\n    return  x ** 2  # squared\n\n\n",
    "  leading and trailing  ",
    "\ttabs\tand\r\nline ends\r\n",
    "\uff26\uff35\uff2c\uff2c width, \u2460 \u00bd \u2167 12345678",
    "!!!???... --- (brackets) [and] {more}",
    "don't DON'T can't\u2019ve",
    "",
]


def _lines() -> list[str]:
    """200 lines of several scripts, the same in every run."""
    rng = random.Random(0)
    lines = list(SENTENCES)
    while len(lines) < 200:
        chosen = rng.sample(SENTENCES, 3)
        lines.append(rng.choice([" ", "  ", "\n", ", ", "\n\n", ""]).join(chosen))
    return lines


LINES = _lines()
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *map(chr, range(33, 127)),
    *(f"##{chr(c)}" for c in range(97, 123)),
]
WORDS += [
    "The",
    "the",
    "old",
    "Old",
    "river",
    "déjà",
    "deja",
    "古",
    "##古",
    "古老",
    "ст",
    "Straße",
]


@dataclasses.dataclass
class Sources:
    """Small vocabularies that the folders are made of."""

    bpe: library.Tokenizer  # with END as its first token
    bare: library.Tokenizer  # without any special token
    roberta: library.Tokenizer
    unigram: library.Tokenizer
    model: bytes  # of sentencepiece


def _byte_level(special: list[str]) -> library.Tokenizer:
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def sources() -> Sources:
    unigram = library.Tokenizer(library.models.Unigram())
    unigram.normalizer = library.normalizers.NFKC()
    unigram.pre_tokenizer = library.pre_tokenizers.Metaspace()
    unigram.decoder = library.decoders.Metaspace()
    trainer = library.trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator(LINES, trainer)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\n", " ") for line in LINES),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    bpe, bare, roberta = _byte_level([END]), _byte_level([]), _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    return Sources(bpe, bare, roberta, unigram, model.getvalue())


Files = dict[str, str | bytes]


def _model(tokenizer: library.Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())["model"]


def _two_files(tokenizer: library.Tokenizer) -> Files:
    """vocab.json and merges.txt."""
    model = _model(tokenizer)
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    return {"vocab.json": json.dumps(model["vocab"]), "merges.txt": "#version: 0.2\n" + merges}


def _one_file(tokenizer: library.Tokenizer, **changes: Any) -> Files:
    """tokenizer.json."""
    return {"tokenizer.json": json.dumps(json.loads(tokenizer.to_str()) | changes)}


def _words(*extra: str) -> Files:
    return {"vocab.txt": "\n".join([*WORDS, *extra]) + "\n"}


def _config(**values: Any) -> Files:
    return {"tokenizer_config.json": json.dumps(values)}


def _specials(**values: Any) -> Files:
    return {"special_tokens_map.json": json.dumps(values)}


def _windows(files: Files) -> Files:
    """As an editor on Windows would have saved them."""
    return {name: codecs.BOM_UTF8 + str(content).replace("\n", "\r\n").encode() for name, content in files.items()}


def _size(tokenizer: library.Tokenizer) -> int:
    return tokenizer.get_vocab_size()


def _pieces(sources: Sources) -> int:
    return sentencepiece.SentencePieceProcessor(model_proto=sources.model).vocab_size()


def _token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False} | flags


def _decoder(first: int, *tokens: dict[str, Any]) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(first + index): token for index, token in enumerate(tokens)}}


_qwen2 = library.pre_tokenizers.Sequence(
    [
        library.pre_tokenizers.Split(
            library.Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def _qwen2_json(tokenizer: library.Tokenizer) -> Files:
    own = copy.deepcopy(tokenizer)
    own.normalizer, own.pre_tokenizer = library.normalizers.NFC(), _qwen2
    return _one_file(own)


def _bert_json(lower_case: bool) -> Files:
    vocab = {word: index for index, word in enumerate(WORDS)}
    tokenizer = library.Tokenizer(library.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=lower_case)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    return _one_file(tokenizer)


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
}
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
PADDING |= {"pad_type_id": 0, "pad_token": END}
CHAT = (_token("<|im_start|>", special=True), _token("<|im_end|>", special=True))

# What is in the folder, the kind that it is read as, its end-of-text, and the class of transformers that reads it too.
FOLDERS: dict[str, tuple[Callable[[Sources], Files], str, str, str]] = {
    "GPT-2": (lambda s: _two_files(s.bpe), "bpe", END, "GPT2Tokenizer"),
    "GPT-2 as it was first published": (
        lambda s: dict(zip(("encoder.json", "vocab.bpe"), _two_files(s.bpe).values(), strict=True)),
        "bpe",
        END,
        "",
    ),
    "an end only among the added tokens": (
        lambda s: (
            _two_files(s.bare) | {"added_tokens.json": json.dumps({END: _size(s.bare)})} | _specials(eos_token=END)
        ),
        "bpe",
        END,
        "GPT2Tokenizer",
    ),
    "RoBERTa by its special tokens": (
        lambda s: _two_files(s.roberta) | _specials(eos_token="</s>"),
        "bpe",
        "</s>",
        "RobertaTokenizer",
    ),
    "RoBERTa by its class": (
        lambda s: _two_files(s.roberta) | _config(tokenizer_class="RobertaTokenizerFast"),
        "bpe",
        "</s>",
        "RobertaTokenizer",
    ),
    "Qwen2 with the tokens of a chat": (
        lambda s: (
            _two_files(s.bare)
            | _config(
                tokenizer_class="Qwen2Tokenizer",
                eos_token=END,
                **_decoder(_size(s.bare), _token(END, special=True), *CHAT),
            )
        ),
        "bpe",
        END,
        "Qwen2Tokenizer",
    ),
    "a space before every text": (
        lambda s: _two_files(s.bpe) | _config(add_prefix_space=True),
        "bpe",
        END,
        "GPT2Tokenizer",
    ),
    "added tokens that stand for text": (
        lambda s: _two_files(s.bpe) | _config(**_decoder(_size(s.bpe), _token("emoji"), _token("()", rstrip=True))),
        "bpe",
        END,
        "GPT2Tokenizer",
    ),
    "runs of spaces among the added tokens": (
        lambda s: (
            _two_files(s.bpe) | {"added_tokens.json": json.dumps({" " * 4: _size(s.bpe), " " * 2: _size(s.bpe) + 1})}
        ),
        "bpe",
        END,
        "GPT2Tokenizer",
    ),
    "files from Windows": (lambda s: _windows(_two_files(s.bpe)), "bpe", END, ""),
    "metadata from Windows": (
        lambda s: _two_files(s.roberta) | _windows(_specials(eos_token=_token("</s>")) | _config(model_max_length=9)),
        "bpe",
        "</s>",
        "",
    ),
    "a lone tokenizer.json": (lambda s: _one_file(s.bpe), "tokenizer_json", END, "PreTrainedTokenizerFast"),
    "a lone tokenizer.json from Windows": (lambda s: _windows(_one_file(s.bpe)), "tokenizer_json", END, ""),
    "a tokenizer.json whose end is named beside it": (
        lambda s: _one_file(s.bare) | _config(eos_token="<|eot|>", **_decoder(_size(s.bare), _token("<|eot|>"))),
        "tokenizer_json",
        "<|eot|>",
        "",
    ),
    "a tokenizer.json that cuts, pads and frames": (
        lambda s: _one_file(s.bpe, truncation=TRUNCATION, padding=PADDING, post_processor=TEMPLATE),
        "tokenizer_json",
        END,
        "",
    ),
    "a tokenizer.json that draws its tokens": (
        lambda s: _one_file(s.bpe, model=_model(s.bpe) | {"dropout": 0.5}),
        "tokenizer_json",
        END,
        "",
    ),
    "a tokenizer.json of a unigram model": (
        lambda s: _one_file(s.unigram),
        "tokenizer_json",
        "</s>",
        "PreTrainedTokenizerFast",
    ),
    "a tokenizer.json that says the same": (
        lambda s: _two_files(s.bpe) | _one_file(s.bpe) | _config(tokenizer_class="GPT2Tokenizer"),
        "bpe",
        END,
        "",
    ),
    "a tokenizer.json that says something else": (
        lambda s: _two_files(s.bpe) | _qwen2_json(s.bpe),
        "tokenizer_json",
        END,
        "PreTrainedTokenizerFast",
    ),
    "a tokenizer.json of an unknown class": (
        lambda s: _two_files(s.bpe) | _one_file(s.bpe) | _config(tokenizer_class="CLIPTokenizer"),
        "tokenizer_json",
        END,
        "",
    ),
    "BERT": (lambda s: _words(), "wordpiece", "[SEP]", "BertTokenizer"),
    "BERT from Windows": (lambda s: _windows(_words()), "wordpiece", "[SEP]", ""),
    "BERT with case": (lambda s: _words() | _config(do_lower_case=False), "wordpiece", "[SEP]", "BertTokenizer"),
    "BERT with accents and whole Chinese words": (
        lambda s: _words() | _config(strip_accents=False, tokenize_chinese_chars=False),
        "wordpiece",
        "[SEP]",
        "BertTokenizer",
    ),
    "BERT with an end of its own": (
        lambda s: _words("[EOS]") | _specials(eos_token="[EOS]", sep_token="[SEP]"),
        "wordpiece",
        "[EOS]",
        "BertTokenizer",
    ),
    "BERT with a tokenizer.json that says the same": (lambda s: _words() | _bert_json(True), "wordpiece", "[SEP]", ""),
    "BERT with a tokenizer.json that keeps case": (
        lambda s: _words() | _bert_json(False),
        "tokenizer_json",
        "[SEP]",
        "PreTrainedTokenizerFast",
    ),
    "sentencepiece": (lambda s: {"spiece.model": s.model}, "sentencepiece", "</s>", ""),
    "sentencepiece, named otherwise": (lambda s: {"source.spm": s.model}, "sentencepiece", "</s>", ""),
    "Llama": (
        lambda s: (
            {"tokenizer.model": s.model}
            | _config(
                tokenizer_class="LlamaTokenizer",
                eos_token={"__type": "AddedToken"} | _token("</s>"),
                add_prefix_space=True,
                **_decoder(0, _token("<unk>", special=True), _token("<s>", special=True), _token("</s>", special=True)),
            )
        ),
        "sentencepiece",
        "</s>",
        "",
    ),
    "Llama with the tokens of a chat": (
        lambda s: {"tokenizer.model": s.model} | _config(eos_token="<|im_end|>", **_decoder(_pieces(s), *CHAT)),
        "sentencepiece",
        "<|im_end|>",
        "",
    ),
    "sentencepiece with a tokenizer.json whose added tokens stand for text": (
        lambda s: (
            {"spiece.model": s.model}
            | _one_file(s.bpe, added_tokens=[_token("emoji") | {"id": _size(s.bpe), "special": False}])
        ),
        "tokenizer_json",
        END,
        "",
    ),
}
# Folders that must be the same tokenizer as another one.
EQUAL = {
    "GPT-2 as it was first published": "GPT-2",
    "files from Windows": "GPT-2",
    "a tokenizer.json that says the same": "GPT-2",
    "a lone tokenizer.json from Windows": "a lone tokenizer.json",
    "metadata from Windows": "RoBERTa by its special tokens",
    "RoBERTa by its class": "RoBERTa by its special tokens",
    "BERT from Windows": "BERT",
    "BERT with a tokenizer.json that says the same": "BERT",
    "sentencepiece, named otherwise": "sentencepiece",
    "Llama": "sentencepiece",
}
# Folders whose tokens must be those of another one, although they are read from other files.
SAME_TOKENS = EQUAL | {
    "a lone tokenizer.json": "GPT-2",
    "a tokenizer.json that cuts, pads and frames": "GPT-2",
    "a tokenizer.json that draws its tokens": "GPT-2",
    "a tokenizer.json of an unknown class": "GPT-2",
    "BERT with a tokenizer.json that keeps case": "BERT with case",
    "Llama with the tokens of a chat": "sentencepiece",
}
LOSSLESS = {
    "sentencepiece with a tokenizer.json whose added tokens stand for text",
    *("GPT-2", "an end only among the added tokens", "RoBERTa by its special tokens", "a lone tokenizer.json"),
    *(
        "runs of spaces among the added tokens",
        "a tokenizer.json whose end is named beside it",
        "a tokenizer.json of an unknown class",
    ),
    *("a tokenizer.json that cuts, pads and frames", "a tokenizer.json that draws its tokens"),
}


def _write(folder, files: Files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def _load(tmp_path, sources: Sources, situation: str) -> tokenizers.Tokenizer:
    return tokenizers.load(_write(tmp_path / situation.replace(" ", "-"), FOLDERS[situation][0](sources)))


@pytest.mark.parametrize("situation", FOLDERS)
def test_every_vintage_is_read(tmp_path, monkeypatch, sources, situation):
    """With its kind, its end-of-text, the same tokens whole and in parts, and again after saving."""
    monkeypatch.setattr(tokenizers, "CHUNK", 50)
    _, kind, end, _ = FOLDERS[situation]
    tokenizer = _load(tmp_path, sources, situation)
    assert (tokenizer.kind, tokenizer.token_text(tokenizer.end_of_text)) == (kind, end)
    encoded = tokenizer.encode_batch(LINES)
    assert tokenizer.lossless == (EQUAL.get(situation, situation) in LOSSLESS)
    if tokenizer.lossless:
        assert [tokenizer.decode(ids) for ids in encoded] == LINES
    for line, ids in zip(LINES, encoded, strict=True):
        assert sum(tokenizer.encode_batch(list(tokenizer.chunks(line))), []) == ids
        assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.end_of_text for token in ids)
    hostile = [end, f"a {end} b{end}", end.upper(), f"{end}\n{end}", "<|im_start|>x<|im_end|>", "</s><s><unk>", "[SEP]"]
    for text in hostile:
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_text not in ids and (not tokenizer.lossless or tokenizer.decode(ids) == text)
    assert tokenizer.decode([tokenizer.end_of_text]) == ""
    assert all(isinstance(tokenizer.token_text(token), str) for token in range(tokenizer.vocab_size))
    tokenizer.save(tmp_path / "saved")
    again = tokenizers.load(tmp_path / "saved")
    for field in ("kind", "hash", "vocab_size", "end_of_text", "lossless"):
        assert getattr(again, field) == getattr(tokenizer, field)
    assert again.encode_batch(LINES) == encoded


@pytest.mark.parametrize("situation", SAME_TOKENS)
def test_other_files_of_a_tokenizer_give_its_tokens(tmp_path, sources, situation):
    """If the form is the same too, it is the very same tokenizer, so that prepared data can be used again."""
    one, other = _load(tmp_path, sources, situation), _load(tmp_path, sources, SAME_TOKENS[situation])
    assert one.encode_batch(LINES) == other.encode_batch(LINES)
    assert (one.hash == other.hash) == (situation in EQUAL)


def test_metadata_change_the_tokens(tmp_path, sources):
    """What the files beside a vocabulary say is not ignored: each pair differs in some line, and in the hash."""
    pairs = [
        ("a space before every text", "GPT-2"),
        ("added tokens that stand for text", "GPT-2"),
        ("runs of spaces among the added tokens", "GPT-2"),
        ("a tokenizer.json that says something else", "GPT-2"),
        ("Qwen2 with the tokens of a chat", "an end only among the added tokens"),
        ("BERT with case", "BERT"),
        ("BERT with accents and whole Chinese words", "BERT"),
    ]
    for one, other in pairs:
        first, second = _load(tmp_path, sources, one), _load(tmp_path, sources, other)
        assert first.encode_batch(LINES) != second.encode_batch(LINES) and first.hash != second.hash


@pytest.mark.parametrize("situation", [name for name, folder in FOLDERS.items() if folder[3]])
def test_the_tokens_are_those_of_transformers(tmp_path, sources, situation):
    """On 200 lines of several scripts."""
    transformers = pytest.importorskip("transformers")
    ours = _load(tmp_path, sources, situation)
    theirs = getattr(transformers, FOLDERS[situation][3]).from_pretrained(tmp_path / situation.replace(" ", "-"))
    for line, ids in zip(LINES, ours.encode_batch(LINES), strict=True):
        assert theirs(line, add_special_tokens=False)["input_ids"] == ids
    assert len(theirs) >= ours.vocab_size and theirs.convert_ids_to_tokens(ours.end_of_text) == FOLDERS[situation][2]


# What is in the folder, and what the error says.
REFUSED: dict[str, tuple[Callable[[Sources], Files], str]] = {
    "a class that is not known": (
        lambda s: _two_files(s.bpe) | _config(tokenizer_class="CLIPTokenizer"),
        "vocab.json and merges.txt for tokenizer_class='CLIP.* put that into the folder",
    ),
    "a class that shifts its ids": (
        lambda s: {"sentencepiece.bpe.model": s.model} | _config(tokenizer_class="XLMRobertaTokenizer"),
        "a sentencepiece model for tokenizer_class='XLMRobertaTokenizer' cannot be read",
    ),
    "two ends": (
        lambda s: _two_files(s.roberta) | _specials(eos_token="</s>") | _config(eos_token="<s>"),
        "eos_token is '</s>' in special_tokens_map.json, but '<s>' in tokenizer_config.json",
    ),
    "an end that is not there": (
        lambda s: _two_files(s.roberta),
        r"the vocabulary has no <\|endoftext\|>; .*name it in special_tokens_map.json",
    ),
    "an added token with an id that is taken": (
        lambda s: _two_files(s.bpe) | {"added_tokens.json": '{"<pad>": 3}'},
        "the added token '<pad>' has id 3, but",
    ),
    "two ids for one added token": (
        lambda s: _two_files(s.bpe)
        | {"added_tokens.json": json.dumps({"<pad>": _size(s.bpe) + 1})}
        | _config(**_decoder(_size(s.bpe), _token("<pad>"))),
        r"'<pad>' has id \d+, but \d+ in tokenizer_config.json",
    ),
    "an added token that is none": (
        lambda s: _two_files(s.bpe) | {"added_tokens.json": '{"<pad>": "x"}'},
        "the added tokens cannot be used: .*'x' is no added token",
    ),
    "special tokens that are no object": (
        lambda s: _two_files(s.bpe) | {"special_tokens_map.json": "[1]"},
        "special_tokens_map.json: is not a JSON object",
    ),
    "a number as a token": (lambda s: _two_files(s.bpe) | _specials(eos_token=3), "eos_token=3: expected the text"),
    "a config that is cut short": (
        lambda s: _two_files(s.bpe) | {"tokenizer_config.json": "{"},
        "tokenizer_config.json: cannot be read as JSON",
    ),
    "a switch that is none": (lambda s: _words() | _config(do_lower_case="yes"), "do_lower_case='yes': expected true"),
    "no words of its own": (lambda s: _words() | _config(do_basic_tokenize=False), "do_basic_tokenize=false"),
    "words that are never split": (lambda s: _words() | _config(never_split=["a"]), "never_split is not supported"),
    "no token for unknown words": (lambda s: {"vocab.txt": "[SEP]\nhello\n"}, r"the vocabulary has no \[UNK\]"),
    "a prefix that the model does not have": (
        lambda s: {"spiece.model": s.model} | _config(add_prefix_space=False),
        "add_prefix_space=false is not what the sentencepiece model does",
    ),
    "case that the model keeps": (
        lambda s: {"spiece.model": s.model} | _config(do_lower_case=True),
        "do_lower_case=true is not supported",
    ),
    "an added token of text that the model does not have": (
        lambda s: {"spiece.model": s.model} | _config(**_decoder(_pieces(s), _token("emoji"))),
        "the added token 'emoji' is not in the sentencepiece model",
    ),
    "other pieces than the model has": (
        lambda s: {"spiece.model": s.model} | _config(**_decoder(1, _token("<pad>"))),
        "token 1 is '<pad>', but '<s>' in the model",
    ),
    "an end that text may become": (
        lambda s: {"spiece.model": s.model} | _specials(eos_token="e"),
        "has no e as its end-of-text",
    ),
    "a model of tiktoken": (
        lambda s: {"tokenizer.model": b"IQ== 0\nIg== 1\n"},
        "not a sentencepiece model .for one of tiktoken",
    ),
    "a tokenizer.json without an end": (
        lambda s: _one_file(s.bare),
        "tokenizer.json: none of its tokens is known as end-of-text",
    ),
    "a tokenizer.json with two ends": (
        lambda s: _one_file(_byte_level([END, "</s>"])),
        r"several of its tokens may be end-of-text: <\|endoftext\|>, </s>; name one",
    ),
    "a tokenizer.json without a model": (lambda s: {"tokenizer.json": "{}"}, "tokenizer.json: it is no tokenizer"),
    "a tokenizer.json that is cut short": (
        lambda s: {"tokenizer.json": str(_one_file(s.bpe)["tokenizer.json"])[:-9]},
        "tokenizer.json: cannot be read as JSON",
    ),
    "a tokenizer.json that is nested too deeply": (lambda s: {"tokenizer.json": "[" * 100_000}, "nested too deeply"),
    "a tokenizer.json and a config that disagree": (
        lambda s: _bert_json(False) | _config(do_lower_case=True),
        "tokenizer.json: do_lower_case is true in tokenizer_config.json beside it, but not in it",
    ),
    "a tokenizer.json and added tokens that disagree": (
        lambda s: _one_file(s.bpe) | {"added_tokens.json": json.dumps({END: 7})},
        r"tokenizer.json: token '<\|endoftext\|>' has id 0, but 7 beside it",
    ),
    "a tokenizer.json with an id that its model gives to another token": (
        lambda s: _one_file(s.bpe, added_tokens=[_token(END, special=True) | {"id": 5}]),
        r"token '<\|endoftext\|>' cannot have the id 5",
    ),
    "a tokenizer.json that cannot encode every text": (
        lambda s: {
            "tokenizer.json": json.dumps(
                {"version": "1.0", "model": {"type": "WordPiece", "vocab": {"</s>": 0, "a": 1}, "unk_token": "?",
                 "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}, "added_tokens": []}
            )
        },
        "its tokenizer cannot encode every text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("situation", REFUSED)
def test_what_is_not_supported_is_refused(tmp_path, sources, situation):
    files, message = REFUSED[situation]
    with pytest.raises(UserError) as caught:
        tokenizers.load(_write(tmp_path / "folder", files(sources)))
    assert re.search(message, str(caught.value)) and str(tmp_path / "folder") in str(caught.value)


def test_folders_that_were_saved_before_there_were_settings(tmp_path, sources):
    """They are read byte for byte as they were then, whatever metadata other programs would have read."""
    files = _two_files(sources.bpe) | _config(kind="bpe", vocab_size=_size(sources.bpe), add_prefix_space=True)
    old, plain = tokenizers.load(_write(tmp_path / "old", files)), _load(tmp_path, sources, "GPT-2")
    assert old.hash == plain.hash and old.encode_batch(LINES) == plain.encode_batch(LINES)
    raw = _windows(_words())["vocab.txt"][3:]
    old = tokenizers.load(_write(tmp_path / "crlf", {"vocab.txt": raw} | _config(kind="wordpiece")))
    assert old.encode("the old river") == _load(tmp_path, sources, "BERT").encode("the old river")
    old.save(tmp_path / "again")
    assert (tmp_path / "again" / "vocab.txt").read_bytes() == raw
