"""Character-level training in the style of text8: raw bytes, length 256.

Command:   armd train --config=experiments/text8.py --config.data.path=FILE_OR_FOLDER --workdir=runs/text8
           A single file is cut into training, validation and test text by position, as text8 is (90M / 5M / 5M).
Hardware:  8 accelerators; any number that divides the batch works.
Figures:   `armd eval` prints bits per byte, which for text8 is bits per character.
Order:     12 layers of width 768, the size that text8 results of masked diffusion are reported at; curriculum as for
           LM1B in the paper (rho = 8).
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores."""
    config = configs.default_config_dict()
    config.data.update(path="text8", tokenizer="bytes")  # a file here, where the flags name no other
    config.model.update(max_length=256, num_layers=12, two_stream_layers=6, width=768, num_heads=12, dropout=0.05)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=2_500)
    config.order.update(ar_steps=100_000, permute_steps=300_000, max_permuted=8, sbp_steps=10_000)
    config.training.update(num_steps=1_000_000, batch_size=512, eval_every=10_000, checkpoint_every=5_000)
    return experiment_file.plain_or_smoke(config, arg)
