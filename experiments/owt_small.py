"""OpenWebText, GPT-2 small size (12 x 768 x 12), length 1024, batch 512: the paper's main setting.

Command:   armd train --config=experiments/owt_small.py --config.data.path=GLOB --config.data.tokenizer=GPT2
               --workdir=runs/owt_small
           GLOB matches .jsonl(.gz) shards with a `text` field; GPT2 is a folder with vocab.json and merges.txt.
Hardware:  a TPU v5e-16 or 8 GPUs of 80 GB. Not run yet. `armd compile --topology=v5e:4x4`: peak 5.8 of 16 GiB per
           chip, 311 ms per step at best (54% MFU, limited by memory).
Paper:     zero-shot perplexity (LAMBADA / WikiText2 / PTB / WikiText103 / 1BW) after 180K steps
           44.66 / 36.25 / 130.31 / 35.66 / 53.18, after 400K 45.35 / 35.64 / 123.43 / 35.15 / 52.94
           (GPT-2: 45.04 / 42.43 / 138.43 / 41.60 / 75.20).
Order:     i_AR = 9K, i_perm = 48K, rho = 32 (the paper's). AdamW 3e-4, constant after 2,500 steps, EMA 0.9999.
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores, on the embedded corpus."""
    config = configs.default_config_dict()
    config.data.update(path="openwebtext", tokenizer="gpt2")  # folders here, unless the flags name others

    # Model: GPT-2 small, 124M parameters.
    config.model.max_length = 1024
    config.model.update(num_layers=12, two_stream_layers=6)  # M = L / 2, as in the paper
    config.model.update(width=768, num_heads=12)
    config.model.aggregator = "positional"  # the paper's; the default, "neighbours", goes beyond it
    config.model.dropout = 0.1
    config.model.remat = "dots"  # keeps matrix products and attention; the backward pass computes the rest again

    # Optimizer: the defaults are the paper's protocol (AdamW 3e-4, constant after 2,500 steps, EMA 0.9999).

    # Orders: the paper's curriculum for OpenWebText.
    config.order.ar_steps = 9_000
    config.order.update(permute_steps=48_000, max_permuted=32)

    # Training: 524,288 tokens per step, 210 billion in all.
    config.training.update(num_steps=400_000, batch_size=512)
    config.training.microbatches = 4  # on 16 chips, 8 rows per chip at a time
    config.training.eval_every = 5_000
    config.training.checkpoint_every = 2_000
    config.training.keep_every = 20_000  # keeps 180K and 400K, for which the paper has figures
    return experiment_file.plain_or_smoke(config, arg)
