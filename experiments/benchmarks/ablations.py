"""Ablations: one command per table of design choices, every choice trained by the same loop on the same batches.

    python experiments/benchmarks/ablations.py TABLE [--only=NAME,…] [--results=FILE] [--steps=N] [--smoke] [--json]

Tables:

    parametrisation   the scale and the start of embeddings and layers, one change at a time, for AR and for ARMD
    aggregator        prefix aggregators in the identity order and under the quickstart's curriculum with its strided
                      steps; bits per byte left to right, in strided orders and in random orders
    optimizer         AdamW and Muon at equal tokens, and Muon again with as many steps as fit AdamW's time
    width             the best learning rate at widths 128, 256 and 512; rates are those of the quickstart's width, and
                      optimizer.base_width makes them fit the others

Every choice is trained at every learning rate with seed 0, and at its own best rate with the other seeds. With
--results, finished trainings are kept and taken from the file, so that an interrupted table is continued. Changes to
the quickstart's config, such as --config.model.num_layers=6, apply to every row.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from typing import Any, Literal

from armd_jax.training import host_memory

if __name__ == "__main__":
    host_memory.settle()  # before JAX is imported

import trainings
from common import machine, print_json
from trainings import Case, Results, Training

from armd_jax import typed
from armd_jax.config import Config
from armd_jax.data.packing import PreparedData
from armd_jax.errors import UserError

TableName = Literal["parametrisation", "aggregator", "optimizer", "width"]
EVALUATIONS = 4  # per training
STREAMS = (2, 4, 8, 16)
SMOKE_VARIANTS = 2  # trained by --smoke, in the last arm; the configs of all rows are checked


@dataclasses.dataclass(frozen=True)
class Variant:
    """One choice: its name in the table, and the changes to the quickstart's config that make it."""

    name: str
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """Variants, each of which is trained in every arm; the first variant is the one that others are compared with.

    Attributes:
      arms: in which model or order the variants are tried.
      rates: learning rates to try.
      steps: updates of every training.
      under_orders: whether bits per byte in several orders are measured after training.
      equal_time: whether the other variants are trained again with as many steps as take the first one's time.
    """

    variants: tuple[Variant, ...]
    arms: tuple[Variant, ...]
    rates: tuple[float, ...]
    steps: int
    under_orders: bool = False
    equal_time: bool = False


RATES = (2.5e-3, 5e-3, 1e-2)

AR = Variant("AR", (*trainings.ADAMW, *trainings.AUTOREGRESSIVE))
IDENTITY = Variant("ARMD, identity order", (*trainings.ADAMW, *trainings.IDENTITY_ORDER))
CURRICULUM = Variant("ARMD, curriculum and SBP", (*trainings.ADAMW, *trainings.CURRICULUM))

TABLES: dict[TableName, Table] = {
    "parametrisation": Table(
        variants=(
            Variant("as it is"),
            Variant("embeddings not scaled", ("model.embedding_scale=one",)),
            Variant("residual projections start unscaled", ("model.residual_init=unscaled",)),
            Variant("residual projections start scaled by depth", ("model.residual_init=depth_scaled",)),
            Variant("residual projections start at 0", ("model.residual_init=zero",)),
            Variant("both as before", ("model.embedding_scale=one", "model.residual_init=depth_scaled")),
            Variant("queries and keys normed", ("model.qk_norm=true",)),
            Variant("logits capped at 30", ("model.logit_cap=30",)),
            Variant("RMS norm", ("model.norm=rmsnorm",)),
            Variant("head not tied", ("model.tie_embeddings=false",)),
            Variant("token vectors learn at the rate of the others", ("optimizer.embedding_rate=1",)),
        ),
        arms=(AR, IDENTITY),
        rates=RATES,
        steps=240,
    ),
    "aggregator": Table(
        variants=(
            Variant("positional", ("model.aggregator=positional",)),
            Variant("shift", ("model.aggregator=shift",)),
            Variant(
                "left neighbour and positional",
                ("model.aggregator=neighbours", "model.neighbours=left", "model.positional_gain=0.3"),
            ),
            Variant(
                "left neighbour",
                ("model.aggregator=neighbours", "model.neighbours=left", "model.positional_gain=0"),
            ),
            Variant(
                "both neighbours and positional",
                ("model.aggregator=neighbours", "model.neighbours=both", "model.positional_gain=0.3"),
            ),
            Variant(
                "both neighbours",
                ("model.aggregator=neighbours", "model.neighbours=both", "model.positional_gain=0"),
            ),
        ),
        arms=(IDENTITY, CURRICULUM),
        rates=RATES[1:2],
        steps=400,
        under_orders=True,
    ),
    "optimizer": Table(
        variants=(
            Variant("AdamW", ("optimizer.kind=adamw",)),
            Variant("Muon", ("optimizer.kind=muon",)),
        ),
        arms=(AR, IDENTITY),
        rates=RATES,
        steps=240,
        equal_time=True,
    ),
    "width": Table(
        variants=tuple(
            Variant(f"width {width}", (f"model.width={width}", f"model.num_heads={width // 32}"))
            for width in (128, 256, 512)
        ),
        arms=(AR, IDENTITY),
        rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2),
        steps=100,
    ),
}


def rows_of(table: Table, words: Sequence[str], smoke: bool, steps: int) -> dict[str, dict[str, Config]]:
    """The config of every row, by arm and variant. Raises UserError if one of them is not a possible config."""
    values = trainings.scaled(trainings.quickstart(smoke), steps)
    return {
        arm.name: {
            variant.name: trainings.with_overrides(values, [*words, *arm.overrides, *variant.overrides])
            for variant in table.variants
        }
        for arm in table.arms
    }


def with_steps(config: Config, steps: int) -> Config:
    """The config with this many steps; warm-up and curriculum keep their shares."""
    return trainings.with_overrides(trainings.scaled(trainings.as_config_dict(config), steps), [])


def equal_time_cases(
    cases: Sequence[Case], results: Results, data: PreparedData, seeds: Sequence[int]
) -> list[tuple[Case, float]]:
    """The cases after the first, each with as many steps as take the time of the first one's training.

    Every one comes with the best learning rate that was found for it. Left out are cases that have not been trained,
    and all of them if the first one has not.
    """
    first, *others = cases
    found = []
    for case in others:
        speeds = [[one.tokens_per_second for one in results.at_best_rate(each, seeds)] for each in (first, case)]
        if all(speeds):
            ratio = statistics.median(speeds[1]) / statistics.median(speeds[0])
            steps = max(round(case.config.training.num_steps * ratio), trainings.QUARTERS)
            name = f"{case.name}, {steps} steps in the time of {first.name}"
            again = trainings.our_case(name, with_steps(case.config, steps), data)
            found.append((again, results.best_rate(case, seeds[0])))
    return found


def summary(cases: Sequence[Case], results: Results, seeds: Sequence[int]) -> dict[str, Any]:
    """The figures of every trained row of an arm; ratios are to the first row, seed by seed."""
    baseline = results.at_best_rate(cases[0], seeds)
    rows: dict[str, Any] = {}
    for case in cases:
        found = results.at_best_rate(case, seeds)
        if found:
            rows[case.name] = {
                "parameters": found[0].num_parameters,
                "learning_rate": found[0].learning_rate,
                "rates": {f"{one.learning_rate:g}": one.final for one in results.of(case, seeds[0])},
                "seeds": [one.seed for one in found],
                "nats": {f"{25 * part}%": [one.nats_at(part / 4) for one in found] for part in range(1, 5)},
                "perplexity_to_first": trainings.perplexity_ratios(found, baseline),
                "scores": {name: [one.scores[name] for one in found] for name in found[0].scores},
                "tokens_per_second": statistics.median(one.tokens_per_second for one in found),
            }
    return rows


def as_markdown(rows: dict[str, Any], first: str) -> str:
    """The rows of an arm as a table."""
    scores = next((list(row["scores"]) for row in rows.values()), [])
    cells = [
        [
            name,
            f"{row['parameters']:,}",
            f"{row['learning_rate']:g}",
            *(trainings.shown(values) for values in row["nats"].values()),
            trainings.shown(row["perplexity_to_first"]),
            *(trainings.shown(row["scores"].get(score, [])) for score in scores),
            f"{row['tokens_per_second']:,.0f}",
        ]
        for name, row in rows.items()
    ]
    parts = ["25%", "50%", "75%", "100%"]
    header = ["", "parameters", "learning rate", *parts, f"perplexity / {first}", *scores, "tokens per second"]
    return trainings.markdown(header, cells)


def main() -> int:
    """Trains a table and prints it. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=typed.choices(TableName))
    trainings.add_flags(parser, "--results")
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="for bits per byte under orders")
    args, words = parser.parse_known_args()
    try:
        ablation(args, trainings.override_words(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def ablation(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Trains what is missing of a table and prints it."""
    table = TABLES[args.table]
    trainings.check_flags(args, [variant.name for variant in table.variants])
    steps = args.steps or (8 if args.smoke else table.steps)
    rates = args.rates or (table.rates[:1] if args.smoke else table.rates)
    seeds = range(1 if args.smoke else args.seeds)
    only = args.only or tuple(variant.name for variant in table.variants)
    if not args.only:
        rows_of(table, words, args.smoke, steps)  # a field that there is not is found before anything is trained
    if args.smoke:
        table = dataclasses.replace(table, arms=table.arms[-1:])
        only = only[:SMOKE_VARIANTS]
    table = dataclasses.replace(table, variants=tuple(v for v in table.variants if v.name in only))
    configs = rows_of(table, words, args.smoke, steps)
    results = Results(args.results)
    progress = not args.json
    data, _ = trainings.prepare(next(iter(next(iter(configs.values())).values())), args.data_dir, progress)
    streams = STREAMS if table.under_orders else ()

    arms: dict[str, list[Case]] = {}
    for arm, by_variant in configs.items():
        cases = [
            trainings.our_case(name, trainings.with_vocabulary(config, data), data, streams, args.split)
            for name, config in by_variant.items()
        ]
        for case in cases:
            trainings.complete(results, case, rates, seeds, data, EVALUATIONS, progress, label=arm)
        again = equal_time_cases(cases, results, data, seeds) if table.equal_time else []
        for case, rate in again:
            trainings.complete(results, case, (rate,), seeds, data, EVALUATIONS, progress, label=arm)
        arms[arm] = [*cases, *(case for case, _ in again)]
    found = {arm: summary(cases, results, seeds) for arm, cases in arms.items()}
    if args.json:
        print_json(machine(False) | {"table": args.table, "steps": steps, "commit": trainings.commit(), "arms": found})
        return
    print_tables(args, arms, results, seeds, found)


def print_tables(
    args: argparse.Namespace,
    arms: dict[str, list[Case]],
    results: Results,
    seeds: Sequence[int],
    found: dict[str, dict[str, Any]],
) -> None:
    """Every arm's table of rows and of learning rates, then where the figures come from."""
    config = next(iter(arms.values()))[0].config
    size = f"{config.training.num_steps} steps of {config.training.batch_size} x {config.model.max_length} tokens"
    print(f"\n{args.table}: {size}; held-out nats per token after a part of the steps, left to right.")
    if TABLES[args.table].under_orders:
        print(f"Bits per byte of the {args.split} split left to right, in S streams, and in uniformly random orders.")
    shown: list[Training] = []
    for arm, cases in arms.items():
        print(f"\n**{arm}**\n\n{as_markdown(found[arm], cases[0].name)}\n")
        print(f"Final nats per token at every learning rate, seed {seeds[0]}:\n")
        print(trainings.rates_table(results, cases, seeds[0]))
        best = [row["learning_rate"] for row in found[arm].values()]
        print(f"\nThe best learning rates of these rows differ by a factor of {max(best) / min(best):g}.")
        for line in trainings.edge_notes(results, cases, seeds[0]):
            print(line)
        shown += [training for case in cases for training in results.at_best_rate(case, seeds)]
    print()
    print("\n".join(trainings.provenance(shown, ["python", *sys.argv])))


if __name__ == "__main__":
    sys.exit(main())
