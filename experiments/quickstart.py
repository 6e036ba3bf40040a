"""Quickstart: a 2M-parameter ARMD on the English prose that every Python installation carries.

Command:   bash launch/quickstart.sh
       or  armd train --config=experiments/quickstart.py --workdir=runs/quickstart
Hardware:  2 CPU cores: 5 to 7 minutes of training, 6 to 8 minutes with evaluation, samples and report.
Data:      the embedded corpus, which is pydoc's help topics and the docstrings of the standard library: 2.0 MB of text.
Choices:   aggregator, curriculum, M and strided steps follow experiments/study/README.md, at the size of this model.
Order:     the paper's curriculum (left to right, then up to 8 shuffled tokens), then strided orders for parallel
           sampling.
Result:    seed 0: 1.602 bits per byte on the test split, left to right and exact. The README has all figures.
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores."""
    config = configs.default_config_dict()

    # Data. An empty path is the embedded corpus; its training split has 577,000 tokens in 2,253 rows.
    config.data.vocab_size = 2048  # sentencepiece; 3.1 bytes per token, and a table of 0.4M of the 2.2M parameters

    # Model: 2.2M parameters.
    config.model.max_length = 256  # with 8 streams, each still has 32 tokens
    config.model.update(num_layers=4, two_stream_layers=2)  # M = L / 2, as in the paper
    config.model.update(width=192, num_heads=6)  # heads of 32
    config.model.positional_width = 64  # half the default: 256 positions need no finer code
    config.model.residual_init = "zero"  # every layer begins as the identity, and the left neighbour decides alone

    # Optimizer. The paper's protocol is made for hundreds of thousands of steps; this run has 800.
    config.optimizer.update(learning_rate=4.5e-3, base_width=192, embedding_rate=2.0)
    config.optimizer.update(schedule="cosine", warmup_steps=60, final_fraction=0.05)
    config.optimizer.beta2 = 0.98  # remembers about 50 steps; with the paper's 0.999 it would be 1,000
    config.optimizer.weight_decay = 0.1
    config.optimizer.ema_decay = 0.98  # likewise about 50 steps; this average of the weights is what gets evaluated

    # Orders: left to right for 440 steps, up to 8 shuffled tokens until step 650, strided for the last 150.
    config.order.ar_steps = 440
    config.order.update(permute_steps=640, max_permuted=8)
    config.order.update(sbp_steps=150, streams=(1, 2, 4, 8))  # the numbers of streams that the samples are drawn in

    # Training: 2,048 tokens per step, 1.64M in all, which is 2.8 passes over the text.
    config.training.update(num_steps=800, batch_size=8)
    config.training.log_every = 10
    config.training.update(eval_every=200, eval_batches=0)  # on the whole validation split of 125 rows
    config.training.checkpoint_every = 200  # a killed run loses little more than a minute
    return experiment_file.plain_or_smoke(config, arg)
