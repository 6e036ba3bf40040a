"""Character-level training in the style of text8: raw bytes, length 256.

Command:   armd train --config=experiments/text8.py --config.data.path=FILE_OR_FOLDER --workdir=runs/text8
           A single file is cut into training, validation and test text by position, as text8 is (90M / 5M / 5M).
Hardware:  8 accelerators; any number that divides the batch works. Not run yet.
Figures:   `armd eval` prints bits per byte, which for text8 are bits per character.
Order:     the curriculum as for LM1B in the paper (rho = 8), then strided orders.
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores."""
    config = configs.default_config_dict()

    # Data. The default fractions of 5% for validation and test are the split that text8 is always reported on.
    config.data.path = "text8"  # a file here, unless the flag names another
    config.data.tokenizer = "bytes"

    # Model: 85M parameters, the size that text8 results of masked diffusion are reported at.
    config.model.max_length = 256
    config.model.update(num_layers=12, two_stream_layers=6)  # M = L / 2, as in the paper
    config.model.update(width=768, num_heads=12)
    config.model.dropout = 0.05

    # Optimizer: the paper's protocol.
    config.optimizer.update(learning_rate=3e-4, warmup_steps=2_500)

    # Orders: the paper's curriculum for LM1B, whose rows are short too.
    config.order.ar_steps = 100_000
    config.order.update(permute_steps=300_000, max_permuted=8)
    config.order.sbp_steps = 10_000  # the last 1% of training

    # Training: 131,072 characters per step.
    config.training.update(num_steps=1_000_000, batch_size=512)
    config.training.update(eval_every=10_000, checkpoint_every=5_000)
    return experiment_file.plain_or_smoke(config, arg)
