"""An ARMD from an autoregressive (AR) model against one from scratch, at the same number of steps in all.

    python experiments/benchmarks/warm_start.py --workdir=runs/warm_start --picture=experiments/pictures/warm_start.png

Three runs of `experiments/quickstart.py` on the same rows of the embedded corpus, each by commands that a user would
take: an AR model for `--ar-steps`; what `armd import` makes of it, trained on the paper's curriculum and strided orders
for the steps that are left of `--steps`; and an ARMD from scratch for all of `--steps`. The learning rate of each run
goes through the quickstart's schedule. Finished parts are not run again, so the command can be repeated after a stop.
The table has bits per byte of the test split; the picture has nats per token of the validation split, left to right.
"""

import argparse
import contextlib
import pathlib
import sys
from typing import Any

from common import machine, print_json
from trainings import commit, markdown

from armd_jax import files
from armd_jax.cli.main import main as armd
from armd_jax.report import style

QUICKSTART = pathlib.Path(__file__).parents[1] / "quickstart.py"
CASES = {"ar": "AR", "warm": "ARMD from the AR model", "scratch": "ARMD from scratch"}


def run(*words: str) -> None:
    """One command of `armd`. A failure ends the program with its exit code; its line is on stderr already."""
    if code := armd(list(words)):
        raise SystemExit(code)


def strided_steps(steps: int) -> int:
    """How many of the last steps are strided, as in the quickstart."""
    return round(0.19 * steps)


def orders(steps: int, sbp_steps: int, left_to_right: float) -> list[str]:
    """The quickstart's curriculum in other numbers of steps. left_to_right: the share before tokens are shuffled."""
    rest = steps - sbp_steps
    return [
        f"--config.order.ar_steps={round(left_to_right * rest)}",
        f"--config.order.permute_steps={rest}",
        f"--config.order.sbp_steps={sbp_steps}",
    ]


def train(args: argparse.Namespace) -> None:
    """All three runs and their evaluations, as far as they are not there yet."""
    rows, ar, imported = args.workdir / "rows", args.workdir / "ar", args.workdir / "imported"
    if not rows.exists():
        words = ["--tokenizer=bytes", "--length=64"] if args.smoke else ["--vocab-size=2048", "--length=256"]
        run("prepare", f"--out={rows}", *words)
    every = max(args.steps // 20, 1)
    common = [
        f"--config={QUICKSTART}{':smoke' if args.smoke else ''}",
        f"--config.data.path={rows}",
        f"--config.data.tokenizer={rows / 'tokenizer'}",
        f"--config.training.eval_every={every}",
        f"--config.training.seed={args.seed}",
    ]
    left, sbp_steps = args.steps - args.ar_steps, strided_steps(args.steps)
    warm_up = f"--config.optimizer.warmup_steps={max(args.steps * 60 // 800, 1)}"
    baseline = ["two_stream_layers=0", "aggregator=shift"]
    own: dict[str, tuple[int, list[str]]] = {
        "ar": (
            args.ar_steps,
            [*(f"--config.model.{field}" for field in baseline), "--config.order.kind=left_to_right"]
            + ["--config.order.sbp_steps=0"],
        ),
        "warm": (
            left,
            [f"--config.training.init_from={imported}", "--config.model.prediction_position=previous"]
            + orders(left, sbp_steps, 0.1),
        ),
        "scratch": (args.steps, orders(args.steps, sbp_steps, 0.68)),
    }
    for name, (steps, fields) in own.items():
        folder = args.workdir / name
        if name == "warm" and not imported.exists():
            run("import", f"--from={ar}", f"--out={imported}", f"--two-stream={1 if args.smoke else 2}")
        run("train", *common, warm_up, *fields, f"--config.training.num_steps={steps}", f"--workdir={folder}")
        if not (folder / "eval.json").exists():
            run("eval", f"--run={folder}", "--split=test", "--no-baselines")


def result(args: argparse.Namespace) -> dict[str, Any]:
    """Curves and final figures of the three runs."""
    found: dict[str, Any] = machine(hugging_face=False) | {"commit": commit(), "seed": args.seed, "runs": {}}
    for name in CASES:
        rows = files.read_json_lines(args.workdir / name / "metrics.jsonl")
        curve = [(row["step"], row["eval/nll"]) for row in rows if "eval/nll" in row]
        evaluation = files.read_json(args.workdir / name / "eval.json")
        found["runs"][name] = {"steps": rows[-1]["step"], "evaluation": evaluation, "curve": curve}
    return found


@style.styled
def draw(found: dict[str, Any]) -> bytes:
    """The curves as the content of a PNG file."""
    figure = style.new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    for (name, label), color in zip(CASES.items(), (style.BLUE, style.VERMILLION, style.ORANGE), strict=True):
        before = found["runs"]["ar"]["steps"] if name == "warm" else 0
        steps, nats = zip(*found["runs"][name]["curve"], strict=True)
        axes.plot([before + step for step in steps], nats, marker="o", markersize=4, lw=1.8, color=color, label=label)
    axes.grid(color=style.FAINT)
    axes.set_axisbelow(True)
    axes.set_xlabel("steps, those of the AR model included")
    axes.set_ylabel("held-out nats per token, left to right")
    axes.legend(frameon=False)
    return style.png(figure)


def as_markdown(found: dict[str, Any]) -> str:
    """The table."""
    header = ["model", "steps", "left to right", "S = 2", "S = 4", "S = 8", "random orders"]
    cells = []
    for name, label in CASES.items():
        each = found["runs"][name]
        measured = each["evaluation"]
        strided = [measured["strided"].get(str(streams)) for streams in (2, 4, 8)]
        values = [measured["left_to_right"], *strided, measured["random_orders"]]
        cells.append([label, str(each["steps"]), *("" if v is None else f"{v['bits_per_byte']:.4f}" for v in values)])
    return markdown(header, cells)


def main() -> int:
    """Runs the benchmark and prints it. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", type=pathlib.Path, required=True, help="folder of the runs")
    add("--steps", type=int, default=800, help="steps in all")
    add("--ar-steps", type=int, default=400, help="of these, steps of the AR model")
    add("--seed", type=int, default=0, help="of all trainings")
    add("--picture", type=pathlib.Path, help="PNG file to write")
    add("--smoke", action="store_true", help="a tiny model, to see that everything runs")
    add("--json", action="store_true", help="print results as one JSON object")
    args = parser.parse_args()
    most = args.steps - strided_steps(args.steps) - 1
    if not 1 <= args.ar_steps <= most:
        print(f"error: --ar-steps={args.ar_steps}: must be in 1 .. {most} of --steps={args.steps}", file=sys.stderr)
        return 2
    with contextlib.redirect_stdout(sys.stderr):  # what the commands print
        train(args)
    found = result(args)
    if args.picture is not None:
        files.write(args.picture, draw(found))
    if args.json:
        print_json(found)
    else:
        print(as_markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
