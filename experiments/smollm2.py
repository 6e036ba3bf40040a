"""SmolLM2-135M as an ARMD: a pretrained autoregressive model learns to write in parallel streams.

Command:   bash launch/smollm2.sh, which fetches and imports the model, trains and samples; its training is
           armd train --config=experiments/smollm2.py --config.training.init_from=runs/smollm2/imported
               --config.data.tokenizer=runs/smollm2/imported/tokenizer --config.data.path=TEXT
               --workdir=runs/smollm2/tuned
           TEXT is a file, a folder or a glob; empty: the embedded corpus.
Hardware:  2 CPU cores. `smollm2.py:gpu` is for one GPU of 80 GB, `smollm2.py:tpu` for a TPU v5e-16.
Order:     strided with 2, 4 and 8 streams; a third of the steps stays left to right, so that nothing is forgotten, and
           a tenth has contiguous blocks, for lossless decoding.
Result:    500 steps of the form for a GPU: 2.92 nats per token left to right, 2.98 / 3.05 / 3.12 with 2 / 4 / 8 streams
           (as imported 3.22, 4.31 / 4.55 / 4.71). experiments/IMPORT.md, "SmolLM2".
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`gpu`, `tpu`: the same at those sizes. `smoke`: under a minute on two cores, from random weights."""
    config = configs.default_config_dict()

    # Model: as `armd import` makes it, with half of the layers in two streams.
    config.model.vocab_size = 49_152
    config.model.max_length = 256
    config.model.update(num_layers=30, two_stream_layers=15)
    config.model.update(width=576, num_heads=9, num_kv_heads=3, mlp="swiglu", mlp_width=1536, norm="rmsnorm")
    config.model.update(rope_base=100_000.0, prediction_position="previous", embedding_scale="one")

    # Optimizer: short and careful. A step changes weights that have seen two trillion tokens.
    config.optimizer.update(learning_rate=1e-4, schedule="cosine", warmup_steps=10, final_fraction=0.1)
    config.optimizer.update(beta2=0.98, ema_decay=0.9)

    # Orders.
    config.order.update(kind="strided", streams=(2, 4, 8), mix=("left_to_right:0.33", "contiguous:0.1"))

    # Training: 2,048 tokens per step.
    config.training.update(num_steps=100, batch_size=8, microbatches=4, log_every=1)  # 2 rows at a time: 6 GB of memory
    config.training.update(eval_every=0, checkpoint_every=25, keep_checkpoints=1)
    if arg in ("gpu", "tpu"):
        # 16,384 tokens per step on a GPU, 131,072 on 16 chips.
        config.model.update(max_length=1024, remat="dots")
        config.optimizer.update(warmup_steps=50, ema_decay=0.98)
        config.training.update(num_steps=1000, batch_size=16 if arg == "gpu" else 128, microbatches=1, log_every=20)
        config.training.checkpoint_every = 500
        return config
    return experiment_file.plain_or_smoke(config, arg)
