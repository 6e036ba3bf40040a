"""OpenWebText, 1.3B parameters (24 x 2048 x 16), length 2048, batch 512.

Command:   armd train --config=experiments/owt_1_3b.py --config.data.path=GLOB --config.data.tokenizer=GPT2
               --workdir=runs/owt_1_3b
           GLOB matches .jsonl(.gz) shards with a `text` field; GPT2 is a folder with vocab.json and merges.txt.
Hardware:  two slices of a TPU v5e-256, the weights replicated over the slices and sharded inside each. Not run yet.
           `armd compile --topology=v5e:16x16 --slices=2`: peak 3.5 of 16 GiB per chip, 131 ms per step at best
           (91% MFU, limited by compute).
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores, on the embedded corpus."""
    config = configs.default_config_dict()
    config.data.update(path="openwebtext", tokenizer="gpt2")  # folders here, unless the flags name others

    # Model: 1.3B parameters.
    config.model.max_length = 2048
    config.model.update(num_layers=24, two_stream_layers=12)  # M = L / 2, as in the paper
    config.model.update(width=2048, num_heads=16)  # heads of 128, which fill a TPU's lanes
    config.model.aggregator = "positional"  # the paper's, which the figures above are for
    config.model.remat = "dots"  # keeps matrix products and attention; the backward pass computes the rest again

    # Optimizer. The paper has no model of this size; GPT-3 1.3B was trained with these.
    config.optimizer.learning_rate = 2e-4
    config.optimizer.update(beta2=0.95, weight_decay=0.1)
    config.optimizer.update(schedule="cosine", final_fraction=0.1)

    # Orders: the paper's curriculum, with the same share of shuffled tokens (1/32) at twice the length.
    config.order.ar_steps = 9_000
    config.order.update(permute_steps=48_000, max_permuted=64)

    # Training: 1.05M tokens per step, 210 billion in all, as many as owt_small.
    config.training.update(num_steps=200_000, batch_size=512)
    config.training.eval_every = 5_000
    config.training.checkpoint_every = 2_000
    config.training.keep_every = 20_000

    # Devices: 2 x 256. The data axis is the two slices, and one row stays on each chip.
    config.mesh.update(data=-1, fsdp=256)
    return experiment_file.plain_or_smoke(config, arg)
