"""OpenWebText, GPT-2 medium size (24 x 1024 x 16), length 1024, batch 512.

Command:   armd train --config=experiments/owt_medium.py --config.data.path=GLOB --config.data.tokenizer=GPT2
               --workdir=runs/owt_medium
           GLOB matches .jsonl(.gz) shards with a `text` field; GPT2 is a folder with vocab.json and merges.txt.
Hardware:  a TPU v5e-256. Not run yet. `armd compile --topology=v5e:16x16`: peak 2.7 of 16 GiB per chip,
           38 ms per step at best (84% MFU, limited by memory as much as by compute). On other slices set mesh.fsdp.
Paper:     zero-shot perplexity (LAMBADA / WikiText2 / PTB / WikiText103 / 1BW) after 120K steps
           40.62 / 27.57 / 105.09 / 27.09 / 45.49, after 300K 39.08 / 26.06 / 97.75 / 25.55 / 43.91
           (GPT-2: 35.66 / 31.80 / 123.14 / 31.39 / 55.72).
Order:     i_AR = 9K, i_perm = 48K, rho = 32 (the paper's).
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores, on the embedded corpus."""
    config = configs.default_config_dict()
    config.data.update(path="openwebtext", tokenizer="gpt2")  # folders here, unless the flags name others

    # Model: GPT-2 medium, 354M parameters.
    config.model.max_length = 1024
    config.model.update(num_layers=24, two_stream_layers=12)  # M = L / 2, as in the paper
    config.model.update(width=1024, num_heads=16)
    config.model.aggregator = "positional"  # the paper's; the default, "neighbours", goes beyond it
    config.model.dropout = 0.1
    config.model.remat = "dots"  # keeps matrix products and attention; the backward pass computes the rest again

    # Optimizer: the defaults are the paper's protocol (AdamW 3e-4, constant after 2,500 steps, EMA 0.9999).

    # Orders: the paper's curriculum for OpenWebText.
    config.order.ar_steps = 9_000
    config.order.update(permute_steps=48_000, max_permuted=32)

    # Training: 524,288 tokens per step, 157 billion in all.
    config.training.update(num_steps=300_000, batch_size=512)
    config.training.eval_every = 5_000
    config.training.checkpoint_every = 2_000
    config.training.keep_every = 20_000  # keeps 120K and 300K, for which the paper has figures

    # Devices: 16 x 16. Weights and optimizer state are sharded over 16 chips; each chip has 2 rows.
    config.mesh.update(data=-1, fsdp=16)
    return experiment_file.plain_or_smoke(config, arg)
