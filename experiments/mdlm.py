"""MDLM on the quickstart's text: a masked-diffusion baseline with the same layers, widths, optimizer and batches.

Command:   armd train --config=experiments/mdlm.py --workdir=runs/mdlm
           armd eval --run=runs/mdlm
           armd sample --run=runs/mdlm --sampler=ancestral --steps=32,64,256
Hardware:  2 CPU cores, as for the quickstart.
Data:      that of the quickstart.
Model:     a bidirectional network with as many parameters as the quickstart's, which fills in masked tokens (Sahoo et
           al. 2024). It has a bound on the likelihood (ELBO), and no exact one.
"""

from ml_collections import ConfigDict
from quickstart import get_config as quickstart

from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores."""
    config = quickstart()  # the same data, layers, widths, optimizer and number of steps

    # Model and orders: masks are drawn instead of orders, so no phase of training has strided ones.
    config.model.kind = "denoiser"
    config.order.sbp_steps = 0
    return experiment_file.plain_or_smoke(config, arg)
