"""Quickstart: a 2M-parameter ARMD on the English prose that every Python installation carries.

Command:   bash launch/quickstart.sh
       or  armd train --config=experiments/quickstart.py --workdir=runs/quickstart
Hardware:  2 CPU cores.
Data:      the embedded corpus (pydoc topics and the standard library's docstrings, about 2 MB), sentencepiece 2048.
Order:     identity, then up to 8 shuffled tokens (the paper's curriculum), then strided orders (SBP fine-tuning).
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores."""
    config = configs.default_config_dict()
    config.data.vocab_size = 2048
    config.model.update(max_length=256, num_layers=4, two_stream_layers=2, width=192, num_heads=6, positional_width=64)
    config.optimizer.update(learning_rate=3e-3, schedule="cosine", warmup_steps=60, final_fraction=0.05)
    config.optimizer.update(beta2=0.98, weight_decay=0.1, ema_decay=0.98)
    config.order.update(ar_steps=440, permute_steps=710, max_permuted=8, streams=(1, 2, 4, 8), sbp_steps=60)
    config.training.update(num_steps=800, batch_size=8)
    config.training.update(log_every=10, eval_every=200, eval_batches=0, checkpoint_every=200)
    return experiment_file.plain_or_smoke(config, arg)
