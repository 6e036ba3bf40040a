"""LM1B (One Billion Word) as in the paper: small size, bert-base-uncased vocabulary, length 128, sentences packed.

Command:   armd train --config=experiments/lm1b.py --config.data.tokenizer=BERT --workdir=runs/lm1b
           BERT is a folder that holds vocab.txt. The data are TFDS's lm1b, prepared once as ArrayRecord:
           tfds build lm1b --file_format=array_record
Hardware:  a TPU v5e-16 or 8 GPUs of 80 GB. Not run yet.
Paper:     test perplexity per token 23.64 after 300K steps, 22.36 after 1M (Transformer 22.83, MDLM 31.78).
           The tokenizer lower-cases, so it is lossy and bits per byte are not defined.
Order:     i_AR = 100K, i_perm = 300K, rho = 8 (the paper's).
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores, on the embedded corpus."""
    config = configs.default_config_dict()

    # Data. Sentences are joined and cut into rows, as in the paper.
    config.data.path = "tfds:lm1b"
    config.data.tokenizer = "bert-base-uncased"  # a folder here, unless the flag names another

    # Model: GPT-2 small, 109M parameters with this vocabulary.
    config.model.max_length = 128
    config.model.update(num_layers=12, two_stream_layers=6)  # M = L / 2, as in the paper
    config.model.update(width=768, num_heads=12)
    config.model.aggregator = "positional"  # the paper's; the default, "neighbours", goes beyond it
    config.model.dropout = 0.1

    # Optimizer: the defaults are the paper's protocol (AdamW 3e-4, constant after 2,500 steps, EMA 0.9999).

    # Orders: the paper's curriculum for LM1B.
    config.order.ar_steps = 100_000
    config.order.update(permute_steps=300_000, max_permuted=8)

    # Training: 65,536 tokens per step, 66 billion in all.
    config.training.update(num_steps=1_000_000, batch_size=512)
    config.training.update(eval_every=10_000, checkpoint_every=5_000)
    return experiment_file.plain_or_smoke(config, arg)
