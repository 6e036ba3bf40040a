"""Strided block-parallel fine-tuning: a trained owt_small goes on with strided orders, S from {1, 2, 4} every step.

Command:   armd train --config=experiments/sbp_finetune.py --config.training.init_from=runs/owt_small
               --config.data.path=GLOB --config.data.tokenizer=GPT2 --workdir=runs/owt_small_sbp
           armd sample --run=runs/owt_small_sbp --streams=1,2,4
Hardware:  as for owt_small.
Paper:     generative perplexity sequential / S = 2 / S = 4 (entropy 8.0 bits): 38.7 / 43.2 / 47.8 after 10K steps,
           39.1 / 40.1 / 43.2 after 50K, 36.5 / 37.8 / 39.4 after 80K.
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores, on the embedded corpus, from random weights."""
    config = configs.default_config_dict()
    config.data.update(path="openwebtext", tokenizer="gpt2")  # folders here, where the flags name no others
    config.model.update(max_length=1024, num_layers=12, two_stream_layers=6, width=768, num_heads=12, dropout=0.1)
    config.order.update(kind="strided", streams=(1, 2, 4))
    config.training.update(num_steps=50_000, batch_size=512, eval_every=5_000, checkpoint_every=2_000)
    config.model.remat = "dots"
    config.training.microbatches = 4
    return experiment_file.plain_or_smoke(config, arg)
