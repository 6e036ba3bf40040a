"""Writes the study's page: its tables and pictures, all of them made from one small file of figures.

    python experiments/study/write_up.py                                  the page again, from metrics.json beside it
    python experiments/study/write_up.py --sweep=runs/study --out=DIR     metrics.json of a finished study, and its page

The page is template.md with its names filled in, so that no figure is typed by hand. If a conclusions.md lies beside
metrics.json, with such names too, it stands in front: what somebody concluded from these figures.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import string
import sys
from importlib import metadata
from typing import Any

import pictures
import study
import tables

from armd_jax import config as configs
from armd_jax import files
from armd_jax.core import parameters
from armd_jax.data.manifest import Manifest, prepared_below
from armd_jax.errors import UserError, nearest
from armd_jax.report import sweep_reading
from armd_jax.report.sweep_reading import Member, Sweep

FOLDER = pathlib.Path(__file__).resolve().parent
METRICS = "metrics.json"
# Figures that the page needs, by the beginnings of their names, and the ends of those that a list has of each item.
KEPT = (
    "eval.unigram.nats",
    "likelihood.",
    "eval.strided.",
    "eval.random_orders.nats",
    "metrics.eval/nll",
    "eval.price",
    "generation.",
)
ENDS = {
    "eval.price": ("independence_gap", "order_cost_per_stream"),
    "generation.": ("generative_perplexity", "entropy_nats", "calls_per_token", "tokens_per_second", "distinct_2"),
}
DIGITS = 7  # significant ones of every figure in metrics.json


def collect(folder: pathlib.Path, jobs: int | None) -> dict[str, Any]:
    """What metrics.json holds of the finished members of a sweep, and where it was measured.

    jobs: how many trainings ran at a time, if that is known.
    Raises UserError if no member is finished.
    """
    sweep = sweep_reading.load(folder)
    finished = [member for member in sweep.members if member.finished]
    if not finished:
        raise UserError(f"--sweep={folder}: none of its {len(sweep.members)} members is finished yet")
    spent = folder.with_name(f"{folder.name}.seconds")  # one line per call of launch/study.sh
    return {
        "measured": {
            "form": str(files.read_json(folder / "sweep.json")["config"]).partition(":")[2],
            "hardware": _hardware(finished),
            "jobs": jobs,
            "versions": {"python": platform.python_version(), "jax": metadata.version("jax")},
            "seconds": sum(map(int, spent.read_text().split())) if spent.is_file() else None,
            "text": _text(folder, folder / "members" / finished[0].name),
        },
        "planned": len(sweep.members),
        "axes": list(sweep.axes),
        "members": [_kept(folder, member) for member in finished],
    }


def _hardware(finished: list[Member]) -> str:
    """The accelerators that a member wrote texts on, or the cores of this machine."""
    for member in finished:
        for entry in (member.documents.get("generation") or {"entries": []})["entries"]:
            if entry["hardware"] and " x cpu " not in entry["hardware"]:
                return str(entry["hardware"])
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores ({models[0] if models else platform.machine()})"


def _text(folder: pathlib.Path, run: pathlib.Path) -> dict[str, Any] | None:
    """What the members were trained on; None if the sweep does not hold the rows itself."""
    found = [one for _, one in prepared_below(folder / "data") if isinstance(one, Manifest)]
    if len(found) != 1:
        return None
    counts = found[0].splits["train"].counts
    return {
        "name": pathlib.PurePath(configs.read(run).data.path).name,
        "documents": counts.documents,
        "bytes": counts.bytes,
        "tokens": counts.tokens,
        "vocabulary": found[0].tokenizer.vocab_size,
    }


def _kept(folder: pathlib.Path, member: Member) -> dict[str, Any]:
    assert member.cost is not None
    return {
        "name": member.name,
        "row": member.row,
        "seed": member.seed,
        "values": {axis: value for axis, value in member.values.items() if value is not None},
        "figures": {name: _rounded(value) for name, value in member.figures.items() if _wanted(name)},
        "curve": [[step, _rounded(value)] for step, value in member.curve("eval/nll")],
        "bound": member.bounds,
        "parameters": parameters.count(configs.read(folder / "members" / member.name).model),
        "cost": vars(member.cost),
    }


def _wanted(name: str) -> bool:
    ends = next((several for start, several in ENDS.items() if name.startswith(start)), None)
    return name.startswith(KEPT) and (ends is None or name.endswith(ends))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def read(file: pathlib.Path) -> tuple[dict[str, Any], Sweep]:
    """Where metrics.json was measured, and the members in it, in the form that `armd report --sweep` has them in."""
    found = files.read_json(file)
    members = tuple(
        Member(
            name=one["name"],
            row=one["row"],
            seed=one["seed"],
            values=one["values"],
            status="finished",
            reason="",
            figures=one["figures"] | {"parameters": one["parameters"]},
            metrics=[
                {"step": step, "eval/nll": value} | ({"eval/nll_upper_bound": value} if one["bound"] else {})
                for step, value in one["curve"]
            ],
            documents={},
            cost=sweep_reading.Cost(**one["cost"]),
        )
        for one in found["members"]
    )
    return found["measured"] | {"planned": found["planned"]}, Sweep("study", tuple(found["axes"]), members)


def page(file: pathlib.Path) -> str:
    """The whole page, from metrics.json."""
    measured, sweep = read(file)
    names = tables.named(measured, sweep) | {"conclusions": ""}
    said = file.with_name("conclusions.md")
    if said.is_file():
        names["conclusions"] = f"{_filled(said, said.read_text(), names).strip()}\n\n"
    template = FOLDER / "template.md"
    text = template.read_text()
    if not study.FORMS[measured["form"]].short:  # it has none of the rows that these parts are about
        text = re.sub(r"<!-- whole study -->.*?<!-- end -->\n", "", text, flags=re.DOTALL)
    return _filled(template, re.sub(r"<!-- (whole study|end) -->\n\n?", "", text), names)


def _filled(file: pathlib.Path, text: str, names: dict[str, str]) -> str:
    """The text with its names filled in. Raises UserError if one of them is none."""
    try:
        return string.Template(text).substitute(names)
    except KeyError as error:
        wrong = str(error.args[0])
        raise UserError(f"{file}: ${wrong} is the name of no figure{nearest(wrong, list(names))}") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}; a dollar sign is written $$") from error


def main() -> int:
    """Writes metrics.json if there is a sweep, the page and its pictures. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=pathlib.Path, help="a finished study; default: the figures that are there")
    parser.add_argument("--jobs", type=int, help="how many trainings ran at a time")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER, help="folder of metrics.json and the page")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.sweep is not None:
            files.write(args.out / METRICS, json.dumps(collect(args.sweep, args.jobs), indent=1) + "\n")
        text = page(args.out / METRICS)
        for name, content in pictures.all_of(read(args.out / METRICS)[1]).items():
            files.write(args.out / name, content)
        files.write(args.out / "README.md", text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
