"""The replay of a report's texts: its data, and, in node, what its script shows call by call."""

import html
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from armd_jax.evaluation.results import Sample
from armd_jax.report import markup, replay, style

NODE = shutil.which("node")
HARNESS = pathlib.Path(__file__).parent / "replay_harness.js"
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed, so no script can run")
TWO = Sample(streams=2, num_calls=3, pieces=("a", " b", "\n", " c"), calls=(1, 3, 2, 3), text="a b\n c")
GIVEN = Sample(streams=1, num_calls=2, pieces=("x", " y", " z"), calls=(0, 1, 2), text="x y z")
NAMED = [("two streams", TWO), ("one stream", GIVEN)]
HOSTILE = "</script><!-- <script>alert(1)</script> \ud800 \u2028"


def _data(panel: str) -> list[dict]:
    return json.loads(re.findall(r'<script type="application/json" id="replay-data">(.*?)</script>', panel)[0])


def _choices(panel: str) -> list[str]:
    """The names of the texts that can be chosen, as HTML."""
    choice = re.findall(r'<select id="replay-choice".*?</select>', panel)[0]
    return re.findall(r'<option value="\d+">(.*?)</option>', choice)


def _play(panel: str, *actions: list, reduced: bool = False) -> list[dict]:
    """What the replay shows at the beginning and after each action."""
    given = json.dumps({"html": panel, "actions": actions, "reduced": reduced})
    done = subprocess.run([NODE, HARNESS], input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _key(name: str, target: str = "replay-text") -> list:
    return ["key", name, target]


def _written(shown: dict) -> str:
    """The text with a dot in place of each token that is not there yet."""
    return "".join("." if token["state"] == "pending" else token["text"] for token in shown["tokens"])


def _still(sample: Sample) -> list[tuple[str, ...]]:
    """(ground, ink, title, text) of each token of the still text."""
    pattern = r'<span style="background:(.*?);color:(.*?)" title="(.*?)">(.*?)</span>'
    return [tuple(map(html.unescape, token)) for token in re.findall(pattern, markup.sample_text(sample), re.DOTALL)]


def test_data_has_the_colours_of_the_still_text():
    """Every token of the replay has the ground and the ink that it has in the still text, and so has the legend."""
    for sample, data in zip((TWO, GIVEN), _data(replay.panel(NAMED)), strict=True):
        assert data["pieces"] == list(sample.pieces) and data["made"] == list(sample.calls)
        colors = [tuple(data["colors"][str(call)]) for call in data["made"]]
        assert colors == [token[:2] for token in _still(sample)]
        assert data["gradient"] in markup.sample_text(sample)
        assert data["calls"] == sample.num_calls


def test_no_text_leaves_its_element():
    """A piece may hold tags, comments and halves of characters: the page has two scripts, and the piece is whole."""
    panel = replay.panel([(HOSTILE, Sample(streams=1, num_calls=1, pieces=(HOSTILE,), calls=(1,)))])
    assert panel.count("<script") == panel.count("</script>") == 2
    assert "<!--" not in panel and "alert(1)</script>" not in panel
    assert _data(panel)[0]["pieces"] == [HOSTILE]
    assert _choices(panel) == [html.escape(HOSTILE)]


@pytest.mark.parametrize(
    "named", [[], [("no calls", Sample(streams=1, text="a"))], [("no number", Sample(pieces=("a",), calls=(1,)))]]
)
def test_no_replay_without_calls(named):
    """Samples whose calls are not known cannot be replayed: there is no panel and no script."""
    assert replay.panel(named) == ""


def test_only_samples_with_calls_are_offered():
    """A sample without calls beside one with calls has no place in the choice."""
    panel = replay.panel([("unknown", Sample(streams=1, text="a")), *NAMED])
    assert _choices(panel) == ["two streams", "one stream"]
    assert len(_data(panel)) == 2


def test_samples_of_one_name_are_numbered():
    """Texts that were drawn together can be told apart."""
    panel = replay.panel([("same", TWO), ("same", TWO), ("other", GIVEN)])
    assert _choices(panel) == ["same, text 1", "same, text 2", "other"]


def test_it_is_hidden_until_a_script_shows_it():
    """Without JavaScript there is nothing but the still texts; every control has a name."""
    panel = replay.panel(NAMED)
    assert re.match(r"<div [^>]* hidden>", panel)
    for tag in re.findall(r"<(?:select|input|button)[^>]*>", panel):
        named = "aria-label=" in tag or "replay-play" in tag or f"<label>Text {tag}" in panel
        assert named or f"<label>Speed {tag}" in panel, tag


def test_a_file_with_absurd_numbers_stays_small():
    """The data grows with the tokens and not with the number of calls that a file claims."""
    assert len(replay.panel([("long", Sample(streams=1, num_calls=2**50, pieces=("a",), calls=(7,)))])) < 20_000
    pieces, calls = (" token",) * 1024, tuple(range(1, 1025))
    assert len(replay.panel([("long", Sample(streams=1, num_calls=1024, pieces=pieces, calls=calls))])) < 70_000


@needs_node
def test_script_is_valid(tmp_path):
    """Node parses the script; a script that is cut short is none."""
    script = re.findall(r"<script>(.*?)</script>", replay.panel(NAMED), re.DOTALL)[0]
    for text, valid in ((script, True), (script.rstrip()[:-5], False)):
        file = tmp_path / "script.js"
        file.write_text(text)
        done = subprocess.run([NODE, "--check", file], capture_output=True, text=True, timeout=60)
        assert (done.returncode == 0) == valid, done.stderr


@needs_node
def test_it_goes_call_by_call():
    """Arrows, Home and End move between calls; tokens of one call come and go together, in their colours."""
    keys = ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "Home", "ArrowLeft", "End"]
    shown = _play(replay.panel(NAMED), *map(_key, keys))
    assert not shown[0]["hidden"]
    assert [_written(step) for step in shown] == [
        "....", "a...", "a.\n.", "a b\n c", "a b\n c", "a.\n.", "....", "....", "a b\n c",
    ]  # fmt: skip
    counts = ["0 of 3: 0", "1 of 3: 1", "2 of 3: 2", "3 of 3: 4", "3 of 3: 4", "2 of 3: 2", "0 of 3: 0", "0 of 3: 0"]
    assert [step["count"] for step in shown] == [f"call {count} of 4 tokens" for count in [*counts, "3 of 3: 4"]]
    assert [step["slider"] for step in shown] == [[call, 3] for call in (0, 1, 2, 3, 3, 2, 0, 0, 3)]
    assert all(step["prevented"] for step in shown[1:])
    for call, step in zip((0, 1, 2, 3, 3, 2, 0, 0, 3), shown, strict=True):
        for token, made, still in zip(step["tokens"], TWO.calls, _still(TWO), strict=True):
            assert token["state"] == ("pending" if made > call else "fresh" if made == call else "")
            assert token["silent"] == (made > call) and token["text"] == still[3]
            assert (*token["color"], token["title"]) == (still[:3] if made <= call else ("", "", ""))


@needs_node
def test_given_tokens_are_there_from_the_beginning():
    """Before the first call, a prompt stands there in its neutral colour, and no call is said to have written it."""
    chosen = _play(replay.panel(NAMED), _key("End"), ["change", "replay-choice", "1"], _key("ArrowRight"))
    assert _written(chosen[2]) == "x.." and _written(chosen[3]) == "x y."
    assert chosen[2]["count"] == "call 0 of 2: 1 of 3 tokens, 1 of them given"
    assert chosen[2]["tokens"][0]["color"] == [style.GIVEN, style.ink_on(style.GIVEN)]
    assert [chosen[2]["tokens"][0][key] for key in ("state", "title")] == ["", "given as prompt"]


@needs_node
def test_it_plays_and_pauses():
    """Space and the button start and stop it at the chosen speed; at the end it stops, and then starts anew."""
    shown = _play(
        replay.panel(NAMED),
        _key(" "), ["wait", 150], _key(" "), ["wait", 1000],  # ten calls per second
        ["change", "replay-speed", "2"], ["click", "replay-play"], ["wait", 450], ["wait", 100], ["wait", 2000],
        ["click", "replay-play"], ["change", "replay-speed", "50"], ["wait", 45],
        _key("ArrowLeft"), ["wait", 1000],
    )  # fmt: skip
    states = [(step["slider"][0], step["button"]) for step in shown]
    assert states == [
        (0, "Play"), (0, "Pause"), (1, "Pause"), (1, "Play"), (1, "Play"),
        (1, "Play"), (1, "Pause"), (1, "Pause"), (2, "Pause"), (3, "Play"),
        (0, "Pause"), (0, "Pause"), (2, "Pause"),
        (1, "Play"), (1, "Play"),
    ]  # fmt: skip


@needs_node
def test_slider_and_buttons_move_it():
    """The slider goes to any call, and the buttons go one call back and forward."""
    shown = _play(
        replay.panel(NAMED), ["input", "replay-slider", "2"], ["click", "replay-forward"], ["click", "replay-back"]
    )
    assert [step["slider"][0] for step in shown] == [0, 2, 3, 2]
    assert [_written(step) for step in shown] == ["....", "a.\n.", "a b\n c", "a.\n."]


@needs_node
def test_keys_that_a_control_uses_are_left_to_it():
    """The arrows move a choice, space presses a button, and other keys are not taken from the page."""
    keys = [_key("ArrowRight", "replay-choice"), _key(" ", "replay-forward"), _key("a"), _key("ArrowUp")]
    shown = _play(replay.panel(NAMED), *keys, _key("ArrowRight", "replay-forward"), _key("ArrowRight", "replay-slider"))
    assert [step["prevented"] for step in shown[1:]] == [False] * 4 + [True] * 2
    assert [step["slider"][0] for step in shown] == [0, 0, 0, 0, 0, 1, 2]


@needs_node
def test_reduced_motion_is_slow():
    """Who asked for less motion begins at the slowest speed, and nothing plays by itself."""
    for reduced, speed in ((False, "10"), (True, "1")):
        shown = _play(replay.panel(NAMED), ["wait", 5000], reduced=reduced)
        assert [(step["speed"], step["slider"][0]) for step in shown] == [(speed, 0)] * 2


@needs_node
def test_the_page_survives_any_piece():
    """A hostile piece is shown as it is."""
    panel = replay.panel([("odd", Sample(streams=1, num_calls=1, pieces=(HOSTILE,), calls=(1,)))])
    assert _play(panel, _key("End"))[1]["tokens"][0]["text"] == HOSTILE
