"""WikiText-2 (2.1M words) with the GPT-2 vocabulary, from local files.

Command:   armd train --config=experiments/wikitext2.py --config.data.path=FOLDER --config.data.tokenizer=GPT2
               --workdir=runs/wikitext2
           armd eval --run=runs/wikitext2        (on CPU: --draws=0 --streams=1, the exact left-to-right figures alone)
           FOLDER holds train.txt, valid.txt and test.txt; GPT2 is a folder with vocab.json and merges.txt.
Hardware:  one accelerator (not run yet); `:cpu` is a small model that trains in 5 minutes on 2 CPU cores.
Result:    `:cpu`, seed 0, 400 steps: 139.9 per token and 385 per word on test.txt, left to right and exact (1.679 bits
           per byte); unigram of the training split 714 and 2,745; `xz -9e` 1.857 bits. 5 minutes on 2 CPU cores.
Figures:   perplexity per word divides the total nats by the words and line ends of the text (245,569 in test.txt).
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`cpu`: a small model for two cores. `smoke`: under a minute, on the embedded corpus."""
    config = configs.default_config_dict()
    config.data.path = "wikitext-2"  # a folder here, unless the flag names another; 2.45M training tokens

    # Model: 51M parameters, half of them in the table of 50,257 tokens.
    config.model.max_length = 512
    config.model.update(num_layers=8, two_stream_layers=4)  # M = L / 2, as in the paper
    config.model.update(width=512, num_heads=8)
    config.model.dropout = 0.2  # the text is read 80 times

    # Optimizer.
    config.optimizer.learning_rate = 1e-3
    config.optimizer.update(schedule="cosine", warmup_steps=500, final_fraction=0.1)
    config.optimizer.update(beta2=0.98, weight_decay=0.1)
    config.optimizer.ema_decay = 0.999  # averages about 1,000 of the 12,000 steps

    # Orders: left to right for a third of training, then up to 16 shuffled tokens, then strided.
    config.order.ar_steps = 4_000
    config.order.update(permute_steps=10_000, max_permuted=16)
    config.order.sbp_steps = 1_000

    # Training: 16,384 tokens per step, 197M in all.
    config.training.update(num_steps=12_000, batch_size=32)
    config.training.update(eval_every=1_000, eval_batches=0)  # on the whole validation split
    return _cpu(config) if arg == "cpu" else experiment_file.plain_or_smoke(config, arg)


def _cpu(config: ConfigDict) -> ConfigDict:
    """The same on two cores: 7.2M parameters, 6.4M of them in the table, and a sixth of one pass over the text."""
    # Model.
    config.model.max_length = 128
    config.model.update(num_layers=4, two_stream_layers=2)
    config.model.update(width=128, num_heads=4)
    config.model.dropout = 0.0  # no text is read twice
    config.model.positional_width = 64
    config.model.loss_chunk = 128  # all logits of a batch at once: 200 MB
    config.model.qk_norm = True  # keeps attention stable at a high learning rate

    # Optimizer, as in the quickstart.
    config.optimizer.update(learning_rate=4.5e-3, embedding_rate=2.0, warmup_steps=60, ema_decay=0.98)

    # Orders.
    config.order.ar_steps = 250
    config.order.update(permute_steps=350, max_permuted=8)
    config.order.sbp_steps = 30

    # Training: 1,024 tokens per step, 0.4M in all.
    config.training.update(num_steps=400, batch_size=8)
    config.training.log_every = 10
    config.training.update(eval_every=200, eval_batches=20)  # of the 253 batches of the validation split
    config.training.checkpoint_every = 100
    return config
