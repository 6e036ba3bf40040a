"""Learning speed: our AR and our ARMD against a Hugging Face GPT-2 of the same size on the same batches.

    python experiments/benchmarks/learning.py [--smoke] [--only=gpt2,ar,…] [--resume-file=FILE] [--json]

Five models are trained: GPT-2 in torch (gpt2), the autoregressive config of this package (ar), ARMD in the identity
order, left to right (armd), ARMD under the quickstart's curriculum with its strided steps (curriculum), and a masked
diffusion model (mdlm), whose figures are bounds: the negative ELBO. Layers, width, heads and vocabulary are the
same, and the parameter counts are within 2% (ours are never the larger ones). All see byte-identical batches in the
same order, and share AdamW's settings, clipping, schedule and the average of the weights that is evaluated. Each is
trained at every learning rate with seed 0, and at its own best rate with the other seeds. With --resume-file, finished
trainings are kept and taken from the file, so that an interrupted table is continued.

Changes to the config, such as --config.model.norm=rmsnorm, apply to every model that has the field.
"""

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU, torch needs its part of the memory
# Threads of torch that wait for one another without spinning. On two cores that anything else also uses, a step of
# GPT-2 takes several times as long if they spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from armd_jax.training import host_memory

if __name__ == "__main__":
    host_memory.settle()  # before JAX is imported

import jax
import trainings
from common import has_hugging_face, machine, print_json
from ml_collections import ConfigDict
from trainings import Case, Results, Training

from armd_jax import experiment_file, typed
from armd_jax.config import Config, ModelConfig
from armd_jax.core import parameters, sizes
from armd_jax.data.packing import PreparedData
from armd_jax.errors import UserError

ModelName = Literal["gpt2", "ar", "armd", "curriculum", "mdlm"]
LABELS: dict[str, str] = {
    "gpt2": "GPT-2 (Hugging Face)",
    "ar": "AR",
    "armd": "ARMD, identity order",
    "curriculum": "ARMD, curriculum and SBP",
    "mdlm": "MDLM (upper bound)",
}
OURS: dict[str, tuple[str, ...]] = {
    "ar": trainings.AUTOREGRESSIVE,
    "armd": trainings.IDENTITY_ORDER,
    "curriculum": trainings.CURRICULUM,
    "mdlm": trainings.DENOISER,
}
STEPS = {"cpu": 300, "125m": 3000}  # cpu: with 3 rates and 3 seeds, under an hour on two cores
RATES = {"cpu": (1.5e-3, 3e-3, 6e-3), "125m": (3e-4, 6e-4, 1.2e-3)}
GPT2_RATES = {"cpu": (5e-4, 1e-3, 2e-3), "125m": RATES["125m"]}  # small GPT-2s want a lower one than ours
EVALUATIONS = 8  # per training; the steps to GPT-2's final loss are interpolated between them
CLOSEST = 0.98  # parameters of ours divided by GPT-2's are between this and 1
MISSING_TORCH = (
    'error: torch and transformers are not installed; pip install -e ".[benchmark]" installs them,'
    " and --only=ar,armd,curriculum,mdlm does without them"
)


def base_values(size: str, smoke: bool) -> ConfigDict:
    """The experiment that all models start from: the quickstart, or GPT-2 small's shape with the quickstart's recipe.

    The larger form needs --config.data.path and --config.data.tokenizer, as experiments/owt_small.py does.
    """
    values = trainings.quickstart(smoke)
    if size == "125m" and not smoke:
        large = experiment_file.load_config_file(str(trainings.ROOT / "experiments" / "owt_small.py"))
        values.model, values.data = large.model, large.data
        values.model.update(dropout=0.0, remat="none")
        values.order.max_permuted = large.order.max_permuted
        values.training.update(batch_size=64, microbatches=4)
        values.optimizer.ema_decay = 0.99
    experiment_file.apply_overrides(values, [f"--config.{change}" for change in trainings.ADAMW])
    return values


def gpt2_parameters(model: ModelConfig) -> int:
    """Parameters of a GPT-2 with the layers, width, length and vocabulary of a model, and a begin token.

    Per layer: matrices of 3, 1, 4 and 4 D x D, their biases, and two norms. Head and embedding are one.
    """
    width = model.width
    tables = (model.vocab_size + 1 + model.max_length) * width
    return tables + model.num_layers * (12 * width**2 + 13 * width) + 2 * width


def with_parameters_of_gpt2(config: Config) -> Config:
    """The config with its MLPs as much wider or narrower as makes its parameters 98 to 100% of GPT-2's.

    Nothing changes if they are so already. Raises UserError if no width of the MLPs does.
    """
    target = gpt2_parameters(config.model)
    usual = sizes.mlp_width(config.model)

    def sized(width: int) -> ModelConfig:
        return dataclasses.replace(config.model, mlp_width=width)

    at_usual = parameters.count(sized(usual))
    per_unit = parameters.count(sized(usual + 1)) - at_usual
    for multiple in (1, 8) if usual % 8 else (8, 1):
        widths = [usual, *range(multiple, 2 * usual, multiple)]
        fitting = [w for w in widths if CLOSEST * target <= at_usual + (w - usual) * per_unit <= target]
        if fitting:
            width = min(fitting, key=lambda w: abs(w - usual))
            return config if width == usual else dataclasses.replace(config, model=sized(width))
    raise UserError(f"no model.mlp_width makes {at_usual:,} parameters 98 to 100% of GPT-2's {target:,}")


def check_recipe(config: Config) -> None:
    """Raises UserError if the config asks for what GPT-2 is not trained with here."""
    wanted = {
        "optimizer.kind": (config.optimizer.kind, "adamw"),
        "model.dropout": (config.model.dropout, 0.0),
        "training.z_loss": (config.training.z_loss, 0.0),
        "training.spike_nats": (config.training.spike_nats, 0.0),
        "model.tie_embeddings": (config.model.tie_embeddings, True),
    }
    for name, (value, only) in wanted.items():
        if value != only:
            raise UserError(f"{name}={value}: GPT-2 is trained with {only}; the comparison needs the same")


def make_cases(values: ConfigDict, overrides: Sequence[str], data: PreparedData, config: Config) -> dict[str, Case]:
    """All four models by name. GPT-2's module, and with it torch, is only imported when GPT-2 is trained."""

    def make_gpt2(one: Config) -> trainings.Learner:
        import torch_gpt2

        return torch_gpt2.Gpt2Learner(one, data)

    setting = trainings.setting_of("gpt2", gpt2_facts(config), data)
    cases = {"gpt2": Case(LABELS["gpt2"], config, setting, make_gpt2)}
    for name, changes in OURS.items():
        ours = trainings.with_vocabulary(trainings.with_overrides(values, [*overrides, *changes]), data)
        cases[name] = trainings.our_case(LABELS[name], with_parameters_of_gpt2(ours), data)
    return cases


def gpt2_facts(config: Config) -> dict[str, Any]:
    """What decides the result of a GPT-2's training, beside the data, the learning rate and the seed."""
    used = {
        "model": ("num_layers", "width", "num_heads", "max_length", "vocab_size", "dtype"),
        "optimizer": (
            "schedule",
            "embedding_rate",
            "warmup_steps",
            "decay_fraction",
            "final_fraction",
            "beta1",
            "beta2",
            "epsilon",
            "weight_decay",
            "clip_norm",
            "ema_decay",
        ),
        "training": ("num_steps", "batch_size", "microbatches"),
    }
    return {
        section: {name: getattr(getattr(config, section), name) for name in names} for section, names in used.items()
    }


def check_pairing(finished: dict[str, list[Training]]) -> dict[int, str]:
    """The digest of the batches of every seed. Raises UserError if two models with the same seed saw other batches."""
    digests: dict[int, str] = {}
    for found in finished.values():
        for one in found:
            if digests.setdefault(one.seed, one.batches) != one.batches:
                raise UserError(f"{one.name}, seed {one.seed}: it was trained on other batches than the other models")
    return digests


def summary(finished: dict[str, list[Training]], cases: dict[str, Case], results: Results) -> dict[str, Any]:
    """All figures by model: means with their standard errors over seeds, and ratios seed by seed."""
    gpt2 = {training.seed: training for training in finished.get("gpt2", [])}
    rows: dict[str, Any] = {}
    for name, found in finished.items():
        arrivals = [trainings.reached(one, gpt2[one.seed].final) for one in found if one.seed in gpt2]
        rows[name] = {
            "name": LABELS[name],
            "parameters": found[0].num_parameters,
            "learning_rate": found[0].learning_rate,
            "rates": {f"{one.learning_rate:g}": one.final for one in results.of(cases[name], found[0].seed)},
            "seeds": [one.seed for one in found],
            "nats": {f"{25 * part}%": [one.nats_at(part / 4) for one in found] for part in range(1, 5)},
            "perplexity_to_gpt2": trainings.perplexity_ratios(found, finished.get("gpt2", [])),
            "perplexity_to_ar": trainings.perplexity_ratios(found, finished.get("ar", [])),
            "steps_to_gpt2": [arrival and arrival[0] for arrival in arrivals],
            "seconds_to_gpt2": [arrival and arrival[1] for arrival in arrivals],
            "tokens_per_second": statistics.median(one.tokens_per_second for one in found),
            "curves": [dataclasses.asdict(one)["curve"] for one in found],
        }
    return rows


def arrival_text(values: Sequence[float | None], digits: int = 0) -> str:
    """Mean ± standard error of steps or seconds, or how many of the seeds did not get there."""
    missing = sum(value is None for value in values)
    if not values or not missing:
        return trainings.shown([value for value in values if value is not None], digits)
    return "not reached" if missing == len(values) else f"not reached by {missing} of {len(values)} seeds"


def as_markdown(rows: dict[str, Any]) -> str:
    """The two tables of the result: losses with ratios, and speed."""
    losses = [
        [
            row["name"],
            f"{row['parameters']:,}",
            f"{row['learning_rate']:g}",
            *(trainings.shown(values) for values in row["nats"].values()),
            trainings.shown(row["perplexity_to_gpt2"]),
            trainings.shown(row["perplexity_to_ar"]),
        ]
        for row in rows.values()
    ]
    speed = [
        [
            row["name"],
            arrival_text(row["steps_to_gpt2"]),
            arrival_text(row["seconds_to_gpt2"], 1),
            f"{row['tokens_per_second']:,.0f}",
        ]
        for row in rows.values()
    ]
    parts = ["25%", "50%", "75%", "100%"]
    header = ["", "parameters", "learning rate", *parts, "perplexity / GPT-2's", "perplexity / AR's"]
    return "\n\n".join(
        [
            "Held-out nats per token after a part of the steps, and ratios of the final perplexities:",
            trainings.markdown(header, losses),
            "How soon GPT-2's final loss was reached, without compilation and evaluations, and training speed:",
            trainings.markdown(["", "steps", "seconds", "tokens per second"], speed),
        ]
    )


def main() -> int:
    """Runs the benchmark and prints it. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trainings.add_flags(parser, "--resume-file")
    parser.add_argument("--size", choices=tuple(STEPS), default="cpu", help="125m: the shape of owt_small, on a GPU")
    args, words = parser.parse_known_args()
    try:
        return benchmark(args, words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def benchmark(args: argparse.Namespace, words: list[str]) -> int:
    """Trains what is missing and prints the tables. Returns the exit code."""
    names = typed.choices(ModelName)
    trainings.check_flags(args, names)
    only = args.only or names
    if "gpt2" in only and not has_hugging_face():
        print(MISSING_TORCH, file=sys.stderr)
        return 2
    if args.size == "125m" and not args.smoke:
        check_gpu("gpt2" in only)
    steps = args.steps or (20 if args.smoke else STEPS[args.size])
    seeds = range(1 if args.smoke else args.seeds)
    values = trainings.scaled(base_values(args.size, args.smoke), steps)
    overrides = trainings.override_words(words)
    config = trainings.with_overrides(values, overrides)
    check_recipe(config)
    results = Results(args.results)
    data, config = trainings.prepare(config, args.data_dir, progress=not args.json)
    cases = make_cases(values, overrides, data, config)
    if not args.json:
        print(f"GPT-2: {gpt2_parameters(config.model):,} parameters", file=sys.stderr)
        for name in OURS:
            model = cases[name].config.model
            count, width = parameters.count(model), sizes.mlp_width(model)
            print(f"{LABELS[name]}: {count:,} parameters, MLP width {width}", file=sys.stderr)
    for name in only:
        usual = (GPT2_RATES if name == "gpt2" else RATES)[args.size]
        rates = args.rates or (usual[1:2] if args.smoke else usual)
        trainings.complete(results, cases[name], rates, seeds, data, EVALUATIONS, not args.json)
    finished = {name: found for name, case in cases.items() if (found := results.at_best_rate(case, seeds))}
    batches = check_pairing(finished)
    rows = summary(finished, cases, results)
    if args.json:
        facts = machine(has_hugging_face())
        print_json(facts | {"steps": steps, "batches": batches, "commit": trainings.commit(), "models": rows})
        return 0
    shown = [one for found in finished.values() for one in found]
    tokens = config.training.batch_size * config.model.max_length
    size = f"{config.training.batch_size} x {config.model.max_length} tokens"
    print(f"\n{steps} steps of {size} ({steps * tokens:,} in all), valid split.\n")
    print(as_markdown(rows))
    print(f"\nFinal nats per token at every learning rate, seed {seeds[0]}:\n")
    print(trainings.rates_table(results, [cases[name] for name in finished], seeds[0]))
    print()
    for line in trainings.edge_notes(results, [cases[name] for name in finished], seeds[0]):
        print(line)
    print("\n".join(trainings.provenance(shown, ["python", *sys.argv])))
    digests = ", ".join(f"{seed}: {digest}" for seed, digest in batches.items())
    print(f"Digest of the batches of each seed, the same for every model: {digests}.")
    return 0


def check_gpu(with_torch: bool) -> None:
    """Raises UserError if JAX, or torch if it takes part, finds no GPU."""
    missing = [] if jax.default_backend() == "gpu" else ["JAX"]
    if with_torch:
        import torch

        missing += [] if torch.cuda.is_available() else ["torch"]
    if missing:
        raise UserError(f"--size=125m needs a GPU, and {' and '.join(missing)} found none")


if __name__ == "__main__":
    sys.exit(main())
