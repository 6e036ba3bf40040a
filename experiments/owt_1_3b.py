"""OpenWebText, 1.3B parameters (24 x 2048 x 16), length 2048, batch 512.

Command:   armd train --config=experiments/owt_1_3b.py --config.data.path=GLOB --config.data.tokenizer=GPT2
               --workdir=runs/owt_1_3b
Hardware:  two slices of a TPU v5e-256, the weights replicated over the slices and sharded inside each.
           `armd compile --topology=v5e:16x16 --slices=2`: peak 3.5 of 16 GiB a chip, predicted 128 ms a step at best
           (94% MFU, limited by compute).
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores, on the embedded corpus."""
    config = configs.default_config_dict()
    config.data.update(path="openwebtext", tokenizer="gpt2")  # folders here, where the flags name no others
    config.model.update(max_length=2048, num_layers=24, two_stream_layers=12, width=2048, num_heads=16)
    config.model.remat = "dots"
    config.order.update(ar_steps=9_000, permute_steps=48_000, max_permuted=64)
    config.optimizer.update(learning_rate=2e-4, beta2=0.95, weight_decay=0.1, schedule="cosine", final_fraction=0.1)
    config.training.update(num_steps=200_000, batch_size=512, eval_every=5_000, checkpoint_every=2_000)
    config.training.keep_every = 20_000
    config.mesh.update(data=-1, fsdp=256)
    return experiment_file.plain_or_smoke(config, arg)
