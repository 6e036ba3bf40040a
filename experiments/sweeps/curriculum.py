"""How far the curriculum shuffles and in which way, on the quickstart: 2 numbers of tokens x 3 ways x 2 seeds.

Command:   armd sweep --config=experiments/sweeps/curriculum.py --out=runs/curriculum
       or  armd sweep --config=experiments/sweeps/curriculum.py:smoke --out=runs/curriculum-smoke
Hardware:  2 CPU cores, for 12 trainings of the quickstart. Once a member is finished, `--list` says how long the others
           take at its rate.
Data:      that of the quickstart, whose rows are made once and shared by all members.
"""

from quickstart import get_config as quickstart

from armd_jax.sweeps import Sweep, axis, product, seeds


def get_sweep(arg: str = "") -> Sweep:
    """`smoke`: 40 steps of a tiny model for every member."""
    base = quickstart(arg)
    members = product(
        axis("order.max_permuted", [8, 32]),  # rho
        axis("order.permute", ["scatter", "window", "reinsert"]),
        seeds(2),
    )
    return Sweep(base, members, after=("eval --streams=2,4 --no-baselines",))
