"""OpenWebText, 7B parameters (32 x 4096 x 32, SwiGLU, RMSNorm, untied head), length 4096, batch 1024.

Command:   armd train --config=experiments/owt_7b.py --config.data.path=GLOB --config.data.tokenizer=GPT2
               --workdir=runs/owt_7b
Hardware:  a TPU v5p of 8 x 8 x 8 chips. `armd compile --topology=v5p:8x8x8`: peak 35.7 of 95 GiB a chip, predicted
           1118 ms a step at best (96% MFU, limited by compute); with remat "full" 8.9 GiB and 1385 ms.
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores, on the embedded corpus."""
    config = configs.default_config_dict()
    config.data.update(path="openwebtext", tokenizer="gpt2")  # folders here, where the flags name no others
    config.model.update(max_length=4096, num_layers=32, two_stream_layers=16, width=4096, num_heads=32)
    config.model.update(mlp="swiglu", norm="rmsnorm", tie_embeddings=False, remat="dots")
    config.order.update(ar_steps=9_000, permute_steps=48_000, max_permuted=128)
    config.optimizer.update(learning_rate=3e-4, beta2=0.95, weight_decay=0.1, schedule="cosine", final_fraction=0.1)
    config.training.update(num_steps=100_000, batch_size=1024, eval_every=5_000, checkpoint_every=1_000)
    config.training.keep_every = 10_000
    config.mesh.update(data=-1, fsdp=64)
    return experiment_file.plain_or_smoke(config, arg)
