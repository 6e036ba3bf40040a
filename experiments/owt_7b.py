"""OpenWebText, 7B parameters (32 x 4096 x 32, SwiGLU, RMSNorm, untied head), length 4096, batch 1024.

Command:   armd train --config=experiments/owt_7b.py --config.data.path=GLOB --config.data.tokenizer=GPT2
               --workdir=runs/owt_7b
           GLOB matches .jsonl(.gz) shards with a `text` field; GPT2 is a folder with vocab.json and merges.txt.
Hardware:  a TPU v5p of 8 x 8 x 8 chips. Not run yet. `armd compile --topology=v5p:8x8x8`: peak 35.7 of 95 GiB per
           chip, 1134 ms per step at best (94% MFU, limited by compute); with remat "full" 9.0 GiB and
           1411 ms.
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores, on the embedded corpus."""
    config = configs.default_config_dict()
    config.data.update(path="openwebtext", tokenizer="gpt2")  # folders here, unless the flags name others

    # Model: 6.9B parameters, in the shape of LLaMA 7B.
    config.model.max_length = 4096
    config.model.update(num_layers=32, two_stream_layers=16)  # M = L / 2, as in the paper
    config.model.update(width=4096, num_heads=32)  # heads of 128, which fill a TPU's lanes
    config.model.update(mlp="swiglu", norm="rmsnorm", tie_embeddings=False)
    config.model.aggregator = "positional"  # the paper's, which the figures above are for
    config.model.remat = "dots"  # with "full" a step takes 1.24 times as long and a quarter of the memory

    # Optimizer. The paper has no model of this size; LLaMA 7B was trained with these.
    config.optimizer.learning_rate = 3e-4
    config.optimizer.update(beta2=0.95, weight_decay=0.1)
    config.optimizer.update(schedule="cosine", final_fraction=0.1)

    # Orders: the paper's curriculum, with the same share of shuffled tokens (1/32) at four times the length.
    config.order.ar_steps = 9_000
    config.order.update(permute_steps=48_000, max_permuted=128)

    # Training: 4.2M tokens per step, 419 billion in all.
    config.training.update(num_steps=100_000, batch_size=1024)
    config.training.eval_every = 5_000
    config.training.checkpoint_every = 1_000
    config.training.keep_every = 10_000

    # Devices: 8 x 64. Weights and optimizer state are sharded over 64 chips; each chip has 2 rows.
    config.mesh.update(data=-1, fsdp=64)
    return experiment_file.plain_or_smoke(config, arg)
