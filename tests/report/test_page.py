"""The report page: self-contained, truthful about its numbers and colours, whole or absent."""

import json
import pathlib
import re

import numpy as np
import pytest

from armd_jax.config import Config, ModelConfig, TrainingConfig, to_json
from armd_jax.errors import UserError
from armd_jax.evaluation import results
from armd_jax.order_config import OrderConfig
from armd_jax.report import bars, masks, order_schedule, page, style

pytestmark = pytest.mark.slow

PNGS = ("bits.png", "curriculum.png", "loss.png", "masks.png", "samples.png", "speed.png", "time.png")
LENGTH = 16


def _config() -> Config:
    return Config(
        model=ModelConfig(max_length=LENGTH),
        order=OrderConfig(ar_steps=10, permute_steps=25, max_permuted=4, streams=(1, 4), sbp_steps=10),
        training=TrainingConfig(num_steps=40, batch_size=2),
    )


def _scores(bits: float) -> dict:
    return {
        "nats_per_token": bits * 2,
        "perplexity_per_token": np.exp(bits * 2),
        "perplexity_per_word": np.exp(bits * 5),
        "bits_per_byte": bits,
    }


def _evaluation() -> dict:
    return {
        "split": "test",
        "documents": 3,
        "bytes": 9000,
        "tokens": 2500,
        "words": 1234,
        "lossless": True,
        "left_to_right": _scores(1.7531),
        "random_orders": {**_scores(2.1049), "draws": 4},
        "strided": {"2": _scores(1.771), "4": _scores(1.812), "8": _scores(1.956)},
        "elbo": {**_scores(2.2222), "diffusion_steps": 64},
        "unigram": _scores(4.321),
        "xz_bits_per_byte": 1.8412,
    }


def _sample(streams: int) -> dict:
    depth = LENGTH // streams
    calls = [streams + i % depth if i % depth else i // depth + 1 for i in range(LENGTH)]
    pieces = ["a", " b", "\n", "  c", "<script>alert('&')</script>", "$x$ é", *"defghijklm"]
    rate = 100.0 * streams**0.5
    sample = {"streams": streams, "num_calls": streams + depth - 1, "tokens_per_second": rate, "calls": calls}
    return {**sample, "text": "".join(pieces), "pieces": pieces}


def _write_json(path: pathlib.Path, values: dict) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run's folder before its report."""
    return _make_run(tmp_path / "tiny")


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> pathlib.Path:
    """A run's folder after its report, with all of its pictures drawn."""
    folder = _make_run(tmp_path_factory.mktemp("reported") / "tiny")
    assert page.write(folder) == folder / "report.html"
    return folder


def _make_run(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    (folder / "config.json").write_text(to_json(_config()))
    rows = [
        {"step": s, "train/nll": 5 - s / 20, "train/loss": 5 - s / 20, "train/learning_rate": 1e-3} for s in range(41)
    ]
    rows += [{"step": s, "eval/nll": 5.1 - s / 20, "eval/perplexity": 20.0} for s in (20, 40)]
    lines = [json.dumps(row) for row in rows] + ['{"step": 41, "train/n']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    events = [
        {"event": "start", "step": 0, "time": 10.0, "began": 0.0, "seconds": {"starting": 10.0}},
        {"event": "spent", "step": 20, "time": 60.0, "seconds": {"starting": 10.0, "training": 50.0}},
        {"event": "spent", "step": 25, "time": 70.0, "seconds": {"starting": 10.0, "training": 60.0}},
        {"event": "resume", "step": 20, "time": 105.0, "began": 95.0, "seconds": {"starting": 10.0}},
        {"event": "end", "step": 40, "time": 200.0, "seconds": {"starting": 10.0, "training": 83.0, "waiting": 12.0}},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    _write_json(folder / "eval.json", _evaluation())
    samples = [_sample(streams) for streams in (1, 2, 4, 8)]
    header = {"length": LENGTH, "batch": 1, "temperature": 1.0, "seed": 0, "hardware": "a <small> machine"}
    _write_json(folder / "samples.json", {**header, "samples": samples})
    return folder


def test_bounds_and_the_price_of_streams_are_shown(run):
    """With them in eval.json the page has their figures, what cannot be known as a dash, and the picture by place."""
    places = [{"first": i, "last": i, "tokens": 40, "nats_per_token": 6.5 - i / 4} for i in (1, 2, 3)]
    places.append({"first": 9, "last": 16, "tokens": 40, "nats_per_token": None})
    price = {"independence_gap": 0.01234, "order_cost": 0.06789, "cold_start": 9.87, "places": places}
    bounds = {"1": {"nll_at_most": 4.8765, "nll_at_most_error": 0.0077}, "2": {"nll_at_least": 4.3219}}
    found = {"rows": 33, "tokens": 8448, "spread": 2.468, "bounds": bounds}
    _write_json(run / "eval.json", {**_evaluation(), "order_bounds": found, "price": {"4": price, "8": {}}})
    html = page.write(run).read_text(encoding="utf-8")
    for words in ("4.8765 ± 0.0077", "4.3219", "33 rows, 8,448 tokens", "2.47", "0.01234", "0.06789", "9.87", "6.2500"):
        assert words in html, words
    assert (run / "places.png").read_bytes().startswith(b"\x89PNG")


def _spans(html: str, sample: int) -> list[tuple[str, str]]:
    """(background, title) of every token of the n-th sample on the page."""
    text = re.findall(r'<div class="text">(.*?)</div>', html, flags=re.DOTALL)[sample]
    return re.findall(r'<span style="background:(#[0-9a-f]{6});color:#[0-9a-f]{6}" title="([^"]*)">', text)


def test_page_is_complete_and_self_contained(reported):
    """The page has every number, links to nothing outside itself, and shows texts of a model as text."""
    html = (reported / "report.html").read_text(encoding="utf-8")

    # Every picture but samples.png, whose texts stand on the page as text.
    links = re.findall(r'(?:src|href)="?([^">]{0,40})', html)
    assert len(links) == len(PNGS) - 1 and all(link.startswith("data:image/png;base64,") for link in links)
    assert "url(" not in html and "@import" not in html and "<link" not in html
    for number in (
        "1.753",
        "1.841",
        "2.105",
        "1.771",
        "1.812",
        "1.956",
        "2.222",
        "4.321",
        "1,234",
        "×2.83",
        "×1.41",
        "283",
    ):
        assert number in html, number
    for facts in ("40 of 40 training steps, resumed 1 time", "<td>16</td>", "<td>9</td>", "<td>7</td>"):
        assert facts in html, facts
    spent = [("training", "133.0", "66.5%"), ("waiting for data", "12.0", "6.0%")]
    spent += [("lost: steps that were trained again", "10.0", "5.0%"), ("wall-clock", "200.0", "100.0%")]
    for row in spent:
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" in html, row
    assert "2 processes, one after another; 5 steps had to be trained again." in html
    assert "a &lt;small&gt; machine" in html
    assert 'class="missing"' not in html

    assert re.findall("<script[^>]*>", html) == ['<script type="application/json" id="replay-data">', "<script>"]
    assert ">&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;</span>" in html
    assert ">\n</span>" in html and ">  c</span>" in html  # as written: the style keeps white space
    assert "white-space: pre-wrap" in html


def test_pictures_are_not_blank(reported):
    """Every PNG is large enough and not of one colour, and no temporary file is left."""
    from matplotlib.image import imread

    for name in PNGS:
        pixels = imread(reported / name)
        assert min(pixels.shape[:2]) > 150, name
        assert pixels[..., :3].std() > 0.05, name
    assert not [path for path in reported.iterdir() if path.name.startswith(".")]


def test_colours_follow_network_calls(reported):
    """Tokens of one network call have one colour, and every call has a colour of its own."""
    html = (reported / "report.html").read_text(encoding="utf-8")
    for index, streams in enumerate((1, 2, 4, 8)):
        sample, spans = _sample(streams), _spans(html, index)
        assert [title for _, title in spans] == [f"call {c} of {sample['num_calls']}" for c in sample["calls"]]
        pairs = {(color, call) for (color, _), call in zip(spans, sample["calls"], strict=True)}
        assert len(pairs) == len({c for c, _ in pairs}) == len({c for _, c in pairs}) == sample["num_calls"]


def test_every_sample_can_be_replayed(reported):
    """The page has the tokens of every sample with their calls for the replay, in the colours of the still texts."""
    html = (reported / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.findall(r'<script type="application/json" id="replay-data">(.*?)</script>', html)[0])
    choice = re.findall(r'<select id="replay-choice".*?</select>', html)[0]
    assert re.findall(r'<option value="\d">(.*?)</option>', choice) == [
        f"{streams} stream{'s' if streams > 1 else ''} in {_sample(streams)['num_calls']} network calls"
        for streams in (1, 2, 4, 8)
    ]
    assert len(data) == 4
    for index, (streams, replayed) in enumerate(zip((1, 2, 4, 8), data, strict=True)):
        sample = _sample(streams)
        assert (replayed["pieces"], replayed["made"]) == (sample["pieces"], sample["calls"])
        assert replayed["calls"] == sample["num_calls"]
        colors = [replayed["colors"][str(call)][0] for call in sample["calls"]]
        assert colors == [color for color, _ in _spans(html, index)]


def test_prompt_tokens_are_grey(run, monkeypatch):
    """Tokens that were given have the colour that no call has."""
    _skip_slow_pictures(monkeypatch)
    sample = _sample(1)
    sample.update(calls=[0, 0, *range(1, LENGTH - 1)], num_calls=LENGTH - 2)
    _write_json(run / "samples.json", {"samples": [sample]})
    spans = _spans(page.write(run).read_text(encoding="utf-8"), 0)
    assert spans[:2] == [(style.GIVEN, "given as prompt")] * 2
    assert style.GIVEN not in [color for color, _ in spans[2:]]


@pytest.mark.parametrize(
    ("name", "command", "picture"),
    [
        ("metrics.jsonl", "armd train --config=FILE --workdir={run}", "loss.png"),
        ("eval.json", "armd eval --run={run}", "bits.png"),
        ("samples.json", "armd sample --run={run}", "samples.png"),
        ("events.jsonl", None, None),
    ],
)
def test_a_missing_file_names_its_command(run, monkeypatch, name, command, picture):
    """If a file is missing, its section names the command that writes it, and its picture is not drawn."""
    _skip_slow_pictures(monkeypatch)
    (run / name).unlink()
    html = page.write(run).read_text(encoding="utf-8")
    assert ('id="replay"' in html) == (name != "samples.json")
    if command is None:
        assert 'class="missing"' not in html
    else:
        assert f"run <code>{command.format(run=run)}</code>" in html
        assert not (run / picture).exists()


def test_a_run_with_nothing_but_its_config(run, monkeypatch):
    """A run that has only begun has a page, which names what can be done next."""
    _skip_slow_pictures(monkeypatch)
    for path in run.iterdir():
        if path.name != "config.json":
            path.unlink()
    html = page.write(run).read_text(encoding="utf-8")
    assert "0 of 40 training steps" in html
    assert "armd eval" in html and "armd sample" in html and "armd train" in html


def test_a_lossy_tokenizer_has_no_bits_per_byte(run, monkeypatch):
    """If the tokenizer changes the text, the page compares nats per token instead."""
    _skip_slow_pictures(monkeypatch)
    scores = {"split": "test", "lossless": False, "left_to_right": {**_scores(1.5), "bits_per_byte": None}}
    _write_json(run / "eval.json", scores)
    html = page.write(run).read_text(encoding="utf-8")
    assert "n/a (lossy)" in html and "1.500" not in html
    assert "3.0000" in html and "Nats per token of held-out text" in html


def test_xz_is_absent_if_it_was_not_measured(run, monkeypatch):
    """Without the compressor's number, the page does not mention it."""
    _skip_slow_pictures(monkeypatch)
    _write_json(run / "eval.json", {**_evaluation(), "xz_bits_per_byte": None})
    assert "xz -9e" not in page.write(run).read_text(encoding="utf-8")


def test_table_and_bars_show_every_row(run, monkeypatch):
    """Whatever `results.rows` has is a line of the table, and given to the picture of the bars."""
    _skip_slow_pictures(monkeypatch)
    drawn = []
    monkeypatch.setattr(bars, "likelihoods", lambda rows, unit: drawn.extend(rows) or b"png")
    html = page.write(run).read_text(encoding="utf-8")
    rows = results.rows(results.read_evaluation(run))
    assert len(rows) == 8
    assert drawn == [(row, row.score.bits_per_byte) for row in rows]
    for row in rows:
        assert f"<td>{row.name}</td><td>{row.score.bits_per_byte:.3f}</td>" in html


@pytest.mark.parametrize("name", ["eval.json", "samples.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"samples": 3, "left_to_right": 3}', "[" * 100_000])
def test_a_damaged_result_is_one_clear_line(run, name, content):
    """A result that no command wrote is one line that names the file, and no report is written."""
    (run / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}.*; write it again with armd {name[:4]}") as raised:
        page.write(run)
    assert "\n" not in str(raised.value) and not (run / "report.html").exists()


def test_odd_rows_of_a_log_are_left_out(run, monkeypatch):
    """Steps and losses that are no finite numbers are not drawn and break nothing."""
    _skip_slow_pictures(monkeypatch)
    odd = ["null", "true", '"x"', "[]", "NaN", "Infinity", "1e999", "1" + "0" * 400]
    rows = [f'{{"step": {step}, "train/nll": {loss}, "eval/nll": {loss}}}' for step in ("3", *odd) for loss in odd]
    (run / "metrics.jsonl").write_text("\n".join(rows))
    assert "data:image/png" in page.write(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"modle": {}}', '{"model": {"width": 7}}'])
def test_no_run_is_one_clear_line(tmp_path, content):
    """A folder that is no run is one line which names it, and nothing is written there."""
    folder = tmp_path / "elsewhere"
    with pytest.raises(UserError, match="elsewhere: there is no such folder"):
        page.write(folder)
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json") as raised:
        page.write(folder)
    assert "\n" not in str(raised.value)
    assert {path.name for path in folder.iterdir()} <= {"config.json"}


def test_a_failing_picture_leaves_the_folder_alone(run, monkeypatch):
    """If a picture cannot be drawn, the report of before is still there, whole."""
    (run / "report.html").write_text("the one before")
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def broken() -> bytes:
        raise RuntimeError("no picture")

    monkeypatch.setattr(masks, "picture", broken)  # the last picture of all
    monkeypatch.setattr(order_schedule, "picture", lambda config: b"png")
    with pytest.raises(RuntimeError, match="no picture"):
        page.write(run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_failing_write_leaves_no_half_file(run, monkeypatch):
    """If the disk is full, that is one line, and no half of a file is left."""
    _skip_slow_pictures(monkeypatch)

    def full(source, target):
        raise OSError(28, "No space left on device")

    before = {path.name for path in run.iterdir()}
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="cannot be written there: No space left"):
        page.write(run)
    assert {path.name for path in run.iterdir()} == before


def _skip_slow_pictures(monkeypatch) -> None:
    """The two pictures that depend on the config alone are drawn in other tests."""
    monkeypatch.setattr(masks, "picture", lambda: b"png")
    monkeypatch.setattr(order_schedule, "picture", lambda config: b"png")
