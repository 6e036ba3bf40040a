"""Mixtures: batches of several prepared folders, a pure function of (seed, step), and what may be mixed."""

import dataclasses
import shutil
from fractions import Fraction

import numpy as np
import pytest

from armd_jax import config as configs
from armd_jax import data_config
from armd_jax.data import loader, mixture, packing
from armd_jax.data_config import DataConfig
from armd_jax.errors import UserError
from armd_jax.evaluation import baselines

LENGTH, BATCH = 16, 10
WEIGHTS = {"wiki": "7", "code": "2", "maths": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three prepared folders in bytes, of 110, 45 and 20 training rows or so, whose tokens differ. Tests only read."""
    place = tmp_path_factory.mktemp("mixture")
    for name, count in {"wiki": 220, "code": 90, "maths": 40}.items():
        (place / f"{name}.txt").write_text("".join(f"{name[0]}{index:06d}\n" for index in range(count)))
        config = DataConfig(path=str(place / f"{name}.txt"), tokenizer="bytes", valid_fraction=0.2, shard_rows=9)
        packing.prepare_into(config, LENGTH, place / name, progress=False)
    return place


def _open(place, weights=None, **fields):
    entries = tuple(f"{place / name}:{weight}" for name, weight in (weights or WEIGHTS).items())
    return mixture.open_chosen(DataConfig(mixture=entries, **fields), LENGTH)[0]


@pytest.fixture(scope="module")
def mixed(place):
    return _open(place)


def _take(data, steps, **arguments):
    with loader.train_batches(data, **({"batch_size": BATCH, "seed": 3} | arguments)) as batches:
        return [next(batches) for _ in range(steps)]


def _source(tokens):
    """The first letters of the names of the sources that rows come from."""
    return ["".join({chr(token) for token in row} & set("wcm")) for row in tokens]


def test_batches_have_the_shares(mixed):
    """Every batch has the shares of the weights, as nearly as whole rows can, and ten batches have them exactly."""
    letters = [_source(tokens) for _, tokens in _take(mixed, 10)]
    for batch in letters:
        assert [abs(batch.count(letter) - share) <= 1 for letter, share in (("w", 7), ("c", 2), ("m", 1))] == [True] * 3
    every = sum(letters, [])
    assert [every.count(letter) for letter in "wcm"] == [70, 20, 10]


def test_batches_depend_on_seed_and_step_only(mixed):
    first = _take(mixed, 30)
    for start in (1, 13, 29):
        ((step, tokens),) = _take(mixed, 1, start_step=start)
        assert step == start and (tokens == first[start][1]).all()
    assert any((a != b).any() for (_, a), (_, b) in zip(first, _take(mixed, 30, seed=4), strict=True))
    assert _take(mixed, 1, start_step=10**9)[0][1].shape == (BATCH, LENGTH)


def test_processes_share_the_batch_of_one(mixed):
    """Each reads its own rows alone."""
    whole = _take(mixed, 3, start_step=7)
    for part in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [9]):
        for (_, tokens), (_, found) in zip(whole, _take(mixed, 3, start_step=7, part=np.array(part)), strict=True):
            assert (found == tokens[part]).all()


def test_every_source_has_epochs_of_its_own(mixed):
    """Each of its epochs holds every full row once, in another permutation, whatever the others do meanwhile."""
    steps = 80
    pairs = [loader.batch_rows(mixed, step, BATCH, 3) for step in range(steps)]
    numbers, rows = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    for number, source in enumerate(mixed.sources):
        num_rows = source.counts("train").tokens // LENGTH
        mine = rows[numbers == number]
        epochs = mine[: len(mine) // num_rows * num_rows].reshape(-1, num_rows)
        assert len(epochs) >= 2 and (np.sort(epochs) == np.arange(num_rows)).all()
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("num_rows", [64, loader.FEW_ROWS + 1])
def test_sources_of_one_size_do_not_keep_step(num_rows):
    """Texts that belong together, such as translations, would otherwise come in the same sequence."""
    orders = [loader.rows_at(np.arange(num_rows), 3, source, num_rows) for source in range(3)]
    assert all(abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.5 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_one_source_is_no_mixture(place):
    """Its batches, its digest and its figures are those of the folder as `data.path`."""
    alone, plain = _open(place, {"wiki": "0.3"}), packing.open_prepared(place / "wiki")
    assert alone.digest == plain.digest and alone.folder == place / "wiki"
    for (_, a), (_, b) in zip(_take(alone, 5), _take(plain, 5), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_evaluation_sees_every_token_of_every_source_once(mixed, split, batch_size):
    """In full batches over the borders of sources, the last rows of which are padded where they stand."""
    counts = mixed.counts(split)
    batches = list(loader.eval_batches(mixed, split, batch_size))
    assert len(batches) == -(-counts.rows // batch_size)
    found = np.concatenate([tokens[valid] for tokens, valid in batches])
    expected = []
    for source in mixed.sources:
        rows = np.concatenate([source.rows(split)[row] for row in range(source.num_rows(split))])
        expected.append(rows[: source.counts(split).tokens])
    assert (found == np.concatenate(expected)).all() and len(found) == counts.tokens
    assert all((tokens[~valid] == mixed.tokenizer.end_of_text).all() for tokens, valid in batches)
    with pytest.raises(UserError, match=r"wiki, .*code, .*maths have no 'dev' split; they have train, valid"):
        mixed.counts("dev")


def test_baselines_are_of_all_sources_together(mixed, tmp_path):
    """And are kept in one file, which another mixture does not take for its own."""
    found = baselines.Baselines(mixed, [tmp_path / "kept.json"])
    tokens = np.concatenate([tokens[valid] for tokens, valid in loader.eval_batches(mixed, "train", 7)])
    train = np.bincount(tokens, minlength=257)
    held_out = np.concatenate([tokens[valid] for tokens, valid in loader.eval_batches(mixed, "valid", 7)])
    nats = -np.log((train + 1) / (train.sum() + 257))[held_out].sum()
    assert found.unigram_nats("valid") == pytest.approx(nats) and found.xz_bits_per_byte("valid") > 0
    assert baselines._read(tmp_path / "kept.json", mixed) is not None
    assert baselines._read(tmp_path / "kept.json", mixed.sources[0]) is None


def test_the_digest_is_of_rows_and_shares(place, tmp_path, mixed):
    """It knows neither where the folders lie nor the scale of the weights; it knows shares, sequence and content."""
    for name in WEIGHTS:
        shutil.copytree(place / name, tmp_path / name)
    assert _open(tmp_path, {"wiki": "0.7", "code": ".2", "maths": "0.10"}).digest == mixed.digest
    others = [{"wiki": "7", "code": "2", "maths": "1.000000001"}, {"code": "2", "wiki": "7", "maths": "1"}]
    others += [{"wiki": "7", "code": "2"}, {"wiki": "1"}, {"wiki": "2", "code": "7", "maths": "1"}]
    assert len({mixed.digest, *(_open(place, weights).digest for weights in others)}) == 6


def test_data_are_found_by_their_digest(place, tmp_path, monkeypatch, mixed):
    """Where the config names them, seen from here, or where they were noted; never other rows."""
    config = DataConfig(mixture=tuple(f"{name}:{weight}" for name, weight in WEIGHTS.items()))
    noted = [place / name for name in WEIGHTS]
    monkeypatch.chdir(tmp_path)
    assert mixture.find(config, [], mixed.digest) is None and mixture.find(config, noted, "another") is None
    assert (
        mixture.find(config, noted[:2], mixed.digest) is None
        and mixture.find(config, noted[::-1], mixed.digest) is None
    )
    assert [source.folder for source in mixture.find(config, noted, mixed.digest).sources] == noted
    monkeypatch.chdir(place)
    assert mixture.find(config, [], mixed.digest).digest == mixed.digest


def test_sources_have_short_names(place, tmp_path):
    shutil.copytree(place / "code", tmp_path / "wiki")
    data = packing.open_prepared(tmp_path / "wiki")
    shutil.copytree(place / "maths", tmp_path / "wiki-1")
    sources = *(packing.open_prepared(folder) for folder in (place / "wiki", tmp_path / "wiki-1")), data
    found = mixture.Mixture(sources, (Fraction(1, 3),) * 3)
    assert mixture.names_of(found) == ("wiki-1", "wiki-1-2", "wiki-3")
    assert mixture.names_of(_open(place)) == ("wiki", "code", "maths") and mixture.names_of(data) == ("wiki",)


def test_the_tokenizer_is_that_of_the_rows(place):
    """It may stay at its default, and then the config that comes back names it."""
    entries = (f"{place / 'wiki'}:1", f"{place / 'code'}:1")
    for asked, resolved in (("sentencepiece", str(place / "wiki" / "tokenizer")), ("bytes", "bytes")):
        config = DataConfig(mixture=entries, tokenizer=asked)
        assert mixture.open_chosen(config, LENGTH)[1] == dataclasses.replace(config, tokenizer=resolved)


def test_what_cannot_be_mixed(place, tmp_path):
    """Each is one line that names the folder and what to do."""
    shutil.copytree(place / "code", tmp_path / "again")
    other = DataConfig(path=str(place / "wiki.txt"), vocab_size=258)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("[UNK]\n[SEP]\n" + "".join(f"w{n:06d}\n" for n in range(220)))
    other = dataclasses.replace(other, tokenizer=str(tmp_path / "words"), vocab_size=2048)
    packing.prepare_into(other, LENGTH, tmp_path / "other", progress=False)
    wiki = f"{place / 'wiki'}:1"
    cases = [
        ((wiki, f"{tmp_path / 'none'}:1"), {}, r"^data.mixture: '.*none' is no folder that `armd prepare` wrote"),
        ((f"{place / 'wiki.txt'}:1",), {}, r"^data.mixture: '.*wiki.txt' is no folder"),
        ((f"{place / 'code'}:1", f"{tmp_path / 'again'}:1"), {}, r"'.*code' and '.*again' hold the same training rows"),
        ((wiki, f"{tmp_path / 'other'}:1"), {}, r"'.*other' were made with another .* --tokenizer=.*wiki/tokenizer$"),
        ((wiki,), {"tokenizer": str(tmp_path / "words")}, r"^data.mixture='.*wiki': its rows were made with another"),
    ]
    for entries, fields, message in cases:
        with pytest.raises(UserError, match=message):
            mixture.open_chosen(DataConfig(mixture=entries, **fields), LENGTH)
    with pytest.raises(UserError, match=r"^data.mixture='.*wiki': its rows have 16 tokens, but model.max_length=64"):
        mixture.open_chosen(DataConfig(mixture=(wiki,)), 64)


def _config(**data):
    return configs.from_config_dict({"data": data})


def test_the_field(monkeypatch):
    """A weight stands behind the last colon, and is exact; addresses have other colons."""
    config = _config(mixture=("gs://bucket/wiki:0.7", "s3://other/code:.2", "here/C:/maths:1")).data
    shares = dict(data_config.mixture(config))
    assert shares == {
        "gs://bucket/wiki": Fraction(7, 19),
        "s3://other/code": Fraction(2, 19),
        "here/C:/maths": Fraction(10, 19),
    }
    assert data_config.described(config, lambda path: path[-4:]) == "36.84% wiki, 10.53% code, 52.63% aths"
    assert (data_config.described(DataConfig(path="text")), data_config.described(DataConfig())) == ("text", "")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *(
            (
                {"mixture": (entry,)},
                r"^data.mixture='.*': expected a prepared folder and its weight, .* prepared/wiki:0.7",
            )
            for entry in ("wiki", "wiki:", ":1", "wiki:0", "wiki:0.0", "wiki:-1", "wiki:1e3", "wiki:nan", "wiki:x", "")
        ),
        ({"mixture": ("wiki:1234567890",)}, "of at most 9 digits before and after the point"),
        ({"mixture": ("gs://bucket/wiki",)}, r"^data.mixture='gs://bucket/wiki': expected a prepared folder"),
        ({"mixture": ("wiki:1", "wiki:2")}, r"^data.mixture='wiki:2': this folder is named twice"),
        ({"mixture": ("hdfs://host/wiki:1",)}, r"^data.mixture='hdfs://host/wiki': hdfs:/ begins the address"),
        ({"mixture": ("wiki:1",), "path": "text"}, r"^data.path='text': data.mixture names the text already"),
        ({"mixture": (7,)}, r"data.mixture=7: expected str"),
    ],
)
def test_mistakes_in_the_field(data, message):
    with pytest.raises(UserError, match=message):
        configs.check(_config(**data))
