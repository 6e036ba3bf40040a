"""The study: what of ARMD is true at sizes that two CPU cores can train, as one sweep.

Command:   bash launch/study.sh TEXT            all of it; TEXT is a file, a folder or a quoted glob
           bash launch/study.sh TEXT minutes    its main rows with one seed and 40 steps
       or  armd sweep --config=experiments/study/study.py --out=runs/study --jobs=2 --config.data.path=TEXT
Hardware:  2 CPU cores. On those of an AMD EPYC, with 81 MB of Wikipedia text and seed 0, the short form took 9 minutes
           after it had installed. `gpu` is the larger form: models of 124M parameters on one GPU; not run yet.
Data:      any text of 20 MB or more; 0.3% of its documents are held out for validation and as many for the test.
Result:    README.md in this folder.

Every row trains on the same batches of a seed, with the same number of updates unless its name says otherwise, and with
as many parameters as the others of its size. The rows `rate` try learning rates beside the chosen ones.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax.core import flops
from armd_jax.errors import UserError
from armd_jax.sweeps import Member, Members, Sweep, chain, choices, product, seeds, then

RATES = {
    "AR": (1.2e-2, 2.4e-2, 4.8e-2),
    "ARMD-identity": (1.2e-2, 2.4e-2, 4.8e-2),
    "MDLM": (6e-3, 1.2e-2, 2.4e-2),
}
# Of AR and MDLM what the short rows `rate` find, of ARMD what the long ones do; a test compares them.
BEST = {"AR": 2.4e-2, "ARMD-identity": 2.4e-2, "MDLM": 1.2e-2}
HALVED = ("AR", "ARMD-identity")  # kinds whose halved rate is also tried in the whole training
TEMPERATURES = (0.7, 0.8, 0.9, 1.0, 1.1)
PRICED = ("SBP=0", "SBP=2.5", "order=scatter-8")  # what their streams cost is taken apart
WIDTHS = (192, 256, 320)

Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """How large the study is.

    steps: of the main rows. short: of the others; 0: there are no others. seeds: of the main rows. evaluations: on the
    validation split, of each main row. equal_flops: kinds that are also trained with the FLOPs of an ARMD. width,
    layers, heads, length: of the models. samples: texts of each way of writing. judge: the member that scores them.
    """

    steps: int
    short: int = 0
    seeds: int = 1
    evaluations: int = 12
    equal_flops: tuple[str, ...] = ("AR", "MDLM")
    batch_size: int = 8
    width: int = 192
    layers: int = 4
    heads: int = 6
    positions: int = 64
    length: int = 512
    vocabulary: int = 4096
    samples: int = 128
    judge: str = "model=AR,seed=0"


FORMS = {
    "": Form(steps=180, short=72, seeds=3, judge="judge=AR"),
    "minutes": Form(steps=40, evaluations=5, equal_flops=("AR",), samples=32),  # MDLM would have 2 steps more
    "smoke": Form(steps=10, short=8, samples=2, vocabulary=400, length=64, judge="judge=AR"),
    "gpu": Form(  # 500 steps are one pass over 80 MB of text
        steps=500, batch_size=32, width=768, layers=12, heads=12, positions=128, length=1024, vocabulary=50_000
    ),
}


def base(form: Form) -> ConfigDict:
    """ARMD under the curriculum with strided steps at the end; 2.6M parameters with a vocabulary of 4096."""
    config = configs.default_config_dict()
    config.data.update(vocab_size=form.vocabulary, valid_fraction=0.003, test_fraction=0.003)

    # Model. A stream that starts cold costs so much whatever its length is, so that short rows would show streams worse
    # than they are.
    config.model.update(max_length=form.length, num_layers=form.layers, two_stream_layers=form.layers // 2)
    config.model.update(width=form.width, num_heads=form.heads, positional_width=form.positions, residual_init="zero")

    # Optimizer: as in the quickstart, but with Muon, which helps AR more than ARMD and so holds no baseline back.
    config.optimizer.update(kind="muon", base_width=192, embedding_rate=2.0)
    config.optimizer.update(schedule="cosine", final_fraction=0.05, beta2=0.98, weight_decay=0.1, ema_decay=0.98)

    config.order.update(max_permuted=8, streams=(1, 2, 4, 8))
    config.training.update(batch_size=form.batch_size, log_every=10, eval_batches=6)
    return config


def schedule(steps: int, sbp: float = 0.2, evaluations: int = 4) -> Overrides:
    """Fields that follow from the number of steps: warm-up, the phases of orders, evaluations and checkpoints.

    sbp: the share of the steps at the end whose orders are strided.
    """
    return {
        "training.num_steps": steps,
        "training.eval_every": max(steps // evaluations, 1),
        "training.checkpoint_every": max(steps // 2, 1),
        "optimizer.warmup_steps": steps // 10,
        "order.ar_steps": steps // 2,
        "order.permute_steps": 3 * steps // 4,
        "order.sbp_steps": math.ceil(steps * sbp),
    }


def kinds(form: Form) -> dict[str, Overrides]:
    """Overrides that make each kind of model, with as many parameters as an ARMD of these sizes.

    What an ARMD has beside the layers, the aggregator, goes into the MLPs of the others.
    """
    mlp = 4 * form.width + round((form.width + form.positions) / (2 * form.layers))
    return {
        "AR": {
            "model.two_stream_layers": 0,
            "model.aggregator": "shift",
            "model.residual_init": "unscaled",
            "model.mlp_width": mlp,
            "order.kind": "left_to_right",
            "order.sbp_steps": 0,
        },
        # What ARMD's path from the left neighbour to the prediction is worth by itself: AR with this path.
        "AR-left-path": {"model.two_stream_layers": 0, "order.kind": "left_to_right", "order.sbp_steps": 0},
        "ARMD-identity": {"order.kind": "left_to_right", "order.sbp_steps": 0},
        "ARMD-curriculum": {},
        "MDLM": {
            "model.kind": "denoiser",
            "model.mlp_width": mlp,
            "order.sbp_steps": 0,
        },
    }


def equal_flops(form: Form, kind: str) -> int:
    """Steps in which a kind of model needs the FLOPs of an ARMD's training."""
    need = []
    for name in ("ARMD-curriculum", kind):
        config = base(form)
        for field, value in kinds(form)[name].items():
            config.update_from_flattened_dict({field: value})
        model = configs.from_config_dict(config).model
        need.append(flops.training_flops_per_token(dataclasses.replace(model, vocab_size=form.vocabulary)).total)
    return round(form.steps * need[0] / need[1])


def trained(form: Form, kind: str, steps: int, evaluations: int = 4) -> Overrides:
    """Overrides of a kind of model that is trained for so many steps at the rate that was chosen for it."""
    rate = BEST[kind if kind in BEST else "ARMD-identity"]
    return schedule(steps, evaluations=evaluations) | {"optimizer.learning_rate": rate} | kinds(form)[kind]


def judge(form: Form) -> Members:
    """An AR model that sees three times as much text as the others, and scores what they write."""
    size = {"model.width": WIDTHS[1], "model.num_heads": WIDTHS[1] // 32}
    wide = dataclasses.replace(form, width=WIDTHS[1])
    return choices("judge", {"AR": trained(form, "AR", 3 * form.steps) | size | kinds(wide)["AR"]})


def long(form: Form) -> Members:
    """MDLM with three times the steps: in as many as the others have, it hardly learns more than token frequencies."""
    return product(choices("long", {"MDLM": trained(form, "MDLM", 3 * form.steps, 18)}), seeds(1))


def main_rows(form: Form) -> Members:
    """Every kind of model at equal steps, and the baselines with the FLOPs of an ARMD.

    MDLM with these FLOPs has one seed: it has hardly more steps than with an equal number of them.
    """
    rows = {kind: trained(form, kind, form.steps, form.evaluations) for kind in kinds(form)}
    once: dict[str, Overrides] = {}
    for kind in form.equal_flops:
        chosen = once if kind == "MDLM" else rows
        chosen[f"{kind}-equal-FLOPs"] = trained(form, kind, equal_flops(form, kind), form.evaluations)
    members = product(choices("model", rows), seeds(form.seeds))
    return chain(members, product(choices("model", once), seeds(1))) if once else members


def starts(form: Form) -> Members:
    """Parametrisations beside those of `kinds`."""
    embedding = {"optimizer.embedding_rate": 1.0}
    return choices(
        "start",
        {
            "AR-zero": trained(form, "AR", form.short) | {"model.residual_init": "zero"},
            "AR-embedding-1": trained(form, "AR", form.short) | embedding,
            "ARMD-unscaled": trained(form, "ARMD-identity", form.short) | {"model.residual_init": "unscaled"},
            "MDLM-unscaled": trained(form, "MDLM", form.short) | {"model.residual_init": "unscaled"},
        },
    )


def orders(form: Form) -> Members:
    """Kinds of orders, all with the strided steps at the end; `scatter-8` is also what other tables start from."""
    rows: dict[str, Overrides] = {
        f"{permute}-{count}": {"order.permute": permute, "order.max_permuted": count}
        for permute in ("scatter", "window", "reinsert")
        for count in (8, 32)
    }
    first, *others = _short(form, "order", rows | {"uniform": {"order.kind": "uniform"}})
    return chain(then((first,), _lossless(form)), tuple(others))


def aggregators(form: Form) -> Members:
    """Prefix aggregators, with MLPs that make up for what they have less or more than the default."""
    return _short(
        form,
        "aggregator",
        {
            "positional": {"model.aggregator": "positional", "model.mlp_width": 792},
            "mean": {"model.aggregator": "mean", "model.mlp_width": 792},
            "shift": {"model.aggregator": "shift", "model.mlp_width": 800},
            "both-neighbours": {"model.neighbours": "both", "model.mlp_width": 744},
        },
    )


def two_stream_layers(form: Form) -> Members:
    """M = 0, 1 = L / 4 and 4 = L; the others have 2 = L / 2."""
    return _short(form, "M", {str(count): {"model.two_stream_layers": count} for count in (0, 1, 4)})


def strided_steps(form: Form) -> Members:
    """The share of strided steps at the end, in percent; the others have 20."""
    rows = {"0": 0.0, "2.5": 0.025}
    return _short(form, "SBP", {name: schedule(form.short, share) for name, share in rows.items()})


def blocks(form: Form) -> Members:
    """Blocks of neighbouring tokens in a tenth of the steps, for lossless decoding."""
    rows = _short(form, "blocks", {"contiguous": {"order.mix": ("contiguous:0.1",)}})
    return then(rows, _lossless(form))


def _lossless(form: Form) -> str:
    """The command that lets a member write losslessly."""
    return f"{_judged(form)} --samples={form.samples} --temperatures=1 --modes=lossless --streams=2,4"


def _short(form: Form, name: str, rows: Mapping[str, Overrides]) -> Members:
    """Variants of ARMD under the curriculum."""
    return choices(name, {label: trained(form, "ARMD-curriculum", form.short) | row for label, row in rows.items()})


def sizes(form: Form) -> Members:
    """Models of other widths, and those of the main rows in as many steps."""
    rows = {
        f"{width}-{kind}": trained(form, kind, form.short)
        | {"model.width": width, "model.num_heads": width // 32}
        | kinds(dataclasses.replace(form, width=width))[kind]
        for width in WIDTHS
        for kind in ("AR", "ARMD-identity")
    }
    return choices("size", rows | {"192-MDLM": trained(form, "MDLM", form.short)})


def rates(form: Form) -> Members:
    """Learning rates beside the chosen ones, which the rows of `sizes` are trained at.

    The best rate of a short training need not be that of a longer one, so that half of the chosen one is also tried in
    as many steps as the main rows.
    """
    rows = {
        f"{kind}-{rate:g}": trained(form, kind, form.short) | {"optimizer.learning_rate": rate}
        for kind, several in RATES.items()
        for rate in several
        if rate != BEST[kind]
    }
    for kind in HALVED:
        half = BEST[kind] / 2
        rows[f"{kind}-{half:g}-whole"] = trained(form, kind, form.steps) | {"optimizer.learning_rate": half}
    return choices("rate", rows)


def get_sweep(arg: str = "") -> Sweep:
    """`minutes`: the main rows with one seed. `smoke`: every row for a few steps. `gpu`: models of 124M parameters."""
    if arg not in FORMS:
        raise UserError(f"unknown argument {arg!r} of the study: it takes {', '.join(filter(None, FORMS))} or nothing")
    form = FORMS[arg]
    members = chain(judge(form), long(form)) if form.short else ()
    members += tuple(_measured(member, form) for member in main_rows(form))
    if form.short:
        members += chain(sizes(form), orders(form), aggregators(form), two_stream_layers(form), strided_steps(form))
        members += chain(blocks(form), rates(form), starts(form))
    return Sweep(base(form), tuple(_evaluated(member) for member in members))


def _evaluated(member: Member) -> Member:
    """With the likelihoods that its kind of model has."""
    match member.overrides:
        case {"model.kind": "denoiser"}:
            how = "--draws=4"  # and token frequencies, to see whether it has learned more
        case {"order.kind": "left_to_right"}:
            how = "--no-baselines --streams=2 --draws=0"  # of what knows one order, only left to right means anything
        case _:
            how = "--no-baselines --streams=2,4,8"
            if member.row in PRICED:
                how += " --price"
    return dataclasses.replace(member, after=(f"eval --split=test {how}", *member.after))


def _measured(member: Member, form: Form) -> Member:
    """With figures of the texts that it writes, if it is an ARMD that has learned to write in streams."""
    if not member.row.endswith("ARMD-curriculum"):
        return member
    assert member.seed is not None
    texts = f"--samples={form.samples} --seed={member.seed * form.samples} --temperatures=1"
    commands = [f"{_judged(form)} {texts} --streams=1,2,4,8", f"{_judged(form)} {texts} --streams=2 --modes=lossless"]
    if form.short and not member.seed:  # one seed is enough for a picture
        others = ",".join(str(one) for one in TEMPERATURES if one != 1)
        commands.append(
            f"{_judged(form)} --samples={max(form.samples // 3, 1)} --temperatures={others} --streams=1,2,4,8"
        )
    return then((member,), *commands)[0]


def _judged(form: Form) -> str:
    """The beginning of the command that lets a member write, and the judge score it."""
    return f"eval --judge={{sweep}}/members/{form.judge} --batch=32"
