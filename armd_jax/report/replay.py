"""The replay of the texts of a report: a text appears network call by network call.

It needs nothing but the page: the calls of all texts are in the page as JSON, and a script plays them. Without
JavaScript the replay stays hidden, and the still texts of the page show the same colours.
"""

import collections
import html
import json
from collections.abc import Sequence
from typing import Any

from armd_jax.evaluation.results import Sample
from armd_jax.report import markup
from armd_jax.report.style import call_color, ink_on

_SPEEDS, _SPEED = (1, 2, 5, 10, 25, 50), 10  # network calls per second

_SCRIPT = """
(() => {
  "use strict";
  const element = (name) => document.getElementById("replay" + name);
  const panel = element(""), text = element("-text"), choice = element("-choice"), speed = element("-speed");
  const play = element("-play"), slider = element("-slider"), count = element("-count");
  const samples = JSON.parse(element("-data").textContent);
  const number = (value) => value.toLocaleString("en");
  let sample, spans, order, given;  // order: the places of the text in the order in which they are written
  let call, written, fresh, timer = null;  // fresh: what the current call has written

  function load(index) {
    sample = samples[index];
    spans = sample.pieces.map((piece) => Object.assign(document.createElement("span"), { textContent: piece }));
    order = [...spans.keys()].sort((a, b) => sample.made[a] - sample.made[b]);
    given = sample.made.filter((made) => made <= 0).length;
    spans.forEach(erase);
    text.textContent = "";
    for (const span of spans) text.append(span);
    slider.max = sample.calls;
    element("-colors").style.background = sample.gradient;
    [written, fresh] = [0, []];
    show(0);
  }

  function write(span, made) {
    [span.style.backgroundColor, span.style.color] = sample.colors[made];
    span.title = made > 0 ? `call ${made} of ${sample.calls}` : "given as prompt";
    span.className = "";
    span.removeAttribute("aria-hidden");
  }

  function erase(span) {
    [span.style.backgroundColor, span.style.color, span.title] = ["", "", ""];
    span.className = "pending";
    span.setAttribute("aria-hidden", "true");
  }

  // Only tokens that change are touched, however long the text is.
  function show(wanted) {
    call = Math.min(Math.max(wanted, 0), sample.calls);
    const made = (rank) => sample.made[order[rank]];
    for (const span of fresh) span.classList.remove("fresh");
    while (written > 0 && made(written - 1) > call) erase(spans[order[--written]]);
    for (; written < order.length && made(written) <= call; written++) write(spans[order[written]], made(written));
    fresh = [];
    for (let rank = written - 1; rank >= 0 && call > 0 && made(rank) === call; rank--) fresh.push(spans[order[rank]]);
    for (const span of fresh) span.classList.add("fresh");
    const where = `call ${number(call)} of ${number(sample.calls)}`;
    count.textContent = `${where}: ${number(written)} of ${number(order.length)} tokens`
      + (given ? `, ${number(given)} of them given` : "");
    slider.value = call;
    slider.setAttribute("aria-valuetext", where);
    if (call === sample.calls) pause();
  }

  function start() {
    if (call === sample.calls) show(0);
    timer = setInterval(() => show(call + 1), 1000 / speed.value);
    play.textContent = "Pause";
    count.setAttribute("aria-live", "off");
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    count.setAttribute("aria-live", "polite");
  }

  const toggle = () => (timer === null ? start() : pause());
  const stop = (wanted) => { pause(); show(wanted); };
  const keys = new Map([
    [" ", toggle],
    ["ArrowLeft", () => stop(call - 1)],
    ["ArrowRight", () => stop(call + 1)],
    ["Home", () => stop(0)],
    ["End", () => stop(sample.calls)],
  ]);
  panel.addEventListener("keydown", (event) => {
    const { key, target } = event, act = keys.get(key);
    // A choice and a button have uses of their own for these keys.
    const used = target.tagName === "SELECT" || (target.tagName === "BUTTON" && key === " ");
    if (!act || used || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    act();
  });
  play.addEventListener("click", toggle);
  element("-back").addEventListener("click", () => stop(call - 1));
  element("-forward").addEventListener("click", () => stop(call + 1));
  slider.addEventListener("input", () => stop(Number(slider.value)));
  choice.addEventListener("change", () => load(choice.value));
  speed.addEventListener("change", () => { if (timer !== null) { pause(); start(); } });

  if (matchMedia("(prefers-reduced-motion: reduce)").matches) speed.value = speed.options[0].value;
  load(choice.value);
  panel.hidden = false;
})();
"""


def panel(named: Sequence[tuple[str, Sample]]) -> str:
    """The replay of all samples whose calls are known, empty if there are none.

    named: samples with their names. Samples of the same name are numbered.
    """
    replayed = [(name, sample) for name, sample in named if markup.has_calls(sample)]
    if not replayed:
        return ""
    names = _numbered([name for name, _ in replayed])
    choices = "".join(f'<option value="{index}">{html.escape(name)}</option>' for index, name in enumerate(names))
    speeds = "".join(
        f'<option value="{speed}"{" selected" if speed == _SPEED else ""}>{speed} call{"s" if speed > 1 else ""}'
        " per second</option>"
        for speed in _SPEEDS
    )
    # No "<" is left in the data, so that no text of a model ends the element or begins a comment.
    data = json.dumps([_data(sample) for _, sample in replayed], separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<div class="replay" id="replay" role="group" aria-labelledby="replay-title" hidden>'
        '<h3 id="replay-title">Watch it write</h3>'
        '<div class="controls">'
        f'<label>Text <select id="replay-choice" autocomplete="off">{choices}</select></label>'
        f'<label>Speed <select id="replay-speed" autocomplete="off">{speeds}</select></label></div>'
        '<div class="controls"><button type="button" id="replay-play">Play</button>'
        '<button type="button" id="replay-back" aria-label="one call back">&lsaquo;</button>'
        '<button type="button" id="replay-forward" aria-label="one call forward">&rsaquo;</button>'
        '<div class="calls"><input type="range" id="replay-slider" min="0" max="0" value="0" step="1"'
        ' aria-label="network call" autocomplete="off"><i id="replay-colors"></i></div></div>'
        '<output class="count" id="replay-count"></output>'
        '<div class="text replayed" id="replay-text" role="group" tabindex="0" aria-label="the text so far"'
        ' aria-describedby="replay-keys"></div>'
        '<p class="note" id="replay-keys">What the last call has written has a frame, and a pale place waits for its'
        " token. Keys: space plays and pauses, the left and right arrows go one call back and forward, Home and End"
        " go to the beginning and the end.</p></div>"
        f'<script type="application/json" id="replay-data">{data}</script><script>{_SCRIPT}</script>'
    )


def _numbered(names: Sequence[str]) -> list[str]:
    """The names, each of which then means one text."""
    total, seen = collections.Counter(names), collections.Counter[str]()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(f"{name}, text {seen[name]}" if total[name] > 1 else name)
    return numbered


def _data(sample: Sample) -> dict[str, Any]:
    """What the script knows of a sample. colors: ground and ink of each call that made a token."""
    last = markup.last_call(sample)
    colors = {call: call_color(call, last) for call in sorted(set(sample.calls))}
    return {
        "calls": last,
        "pieces": sample.pieces,
        "made": sample.calls,
        "colors": {call: (color, ink_on(color)) for call, color in colors.items()},
        "gradient": markup.gradient(last),
    }
