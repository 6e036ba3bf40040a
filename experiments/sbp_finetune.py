"""Strided block-parallel (SBP) fine-tuning: a trained owt_small learns to write in 1, 2 and 4 parallel streams.

Command:   armd train --config=experiments/sbp_finetune.py --config.training.init_from=runs/owt_small
               --config.data.path=GLOB --config.data.tokenizer=GPT2 --workdir=runs/owt_small_sbp
           armd sample --run=runs/owt_small_sbp --streams=1,2,4
           GLOB and GPT2 as for owt_small.
Hardware:  as for owt_small. Not run yet.
Paper:     generative perplexity sequential / S = 2 / S = 4 (entropy 8.0 bits): 38.7 / 43.2 / 47.8 after 10K steps,
           39.1 / 40.1 / 43.2 after 50K, 36.5 / 37.8 / 39.4 after 80K.
"""

from ml_collections import ConfigDict
from owt_small import get_config as owt_small

from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores, on the embedded corpus, from random weights."""
    config = owt_small()  # the same model, data and optimizer

    # Orders: at every step the number of streams is drawn from these.
    config.order.update(kind="strided", streams=(1, 2, 4))

    # Training.
    config.training.num_steps = 50_000  # the paper tries 10K, 50K and 80K
    config.training.keep_every = 0  # the newest checkpoints are enough
    return experiment_file.plain_or_smoke(config, arg)
