"""WikiText-2 (2.1M words) with the GPT-2 vocabulary, from local files.

Command:   armd train --config=experiments/wikitext2.py --config.data.path=FOLDER --config.data.tokenizer=GPT2
               --workdir=runs/wikitext2
           armd eval --run=runs/wikitext2        (on CPU: --draws=0 --streams=1, the exact left-to-right figures alone)
           FOLDER holds train.txt, valid.txt and test.txt; GPT2 holds vocab.json and merges.txt.
Hardware:  one accelerator; `:cpu` is a small model that trains in at most 15 minutes on 2 CPU cores.
Result:    `:cpu`, seed 0, 400 steps: 222.5 per token and 673 per word on test.txt, left to right and exact (1.836 bits
           per byte); unigram of the training split 714 and 2,745; `xz -9e` 1.857 bits. 2.5 minutes on 2 CPU cores.
Figures:   perplexity per word divides the total nats by the words and line ends of the text (245,569 in test.txt).
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`cpu`: a small model for two cores. `smoke`: under a minute, on the embedded corpus."""
    config = configs.default_config_dict()
    config.data.path = "wikitext-2"  # a folder here, where the flags name no other
    config.model.update(max_length=512, num_layers=8, two_stream_layers=4, width=512, num_heads=8, dropout=0.2)
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=500, final_fraction=0.1)
    config.optimizer.update(beta2=0.98, weight_decay=0.1, ema_decay=0.999)
    config.order.update(ar_steps=4_000, permute_steps=10_000, max_permuted=16, sbp_steps=1_000)
    config.training.update(num_steps=12_000, batch_size=32, eval_every=1_000, eval_batches=0)
    if arg == "cpu":
        config.model.update(max_length=128, num_layers=4, two_stream_layers=2, width=128, num_heads=4, dropout=0.0)
        config.model.update(positional_width=64, loss_chunk=128)  # all logits of a batch at once: 200 MB
        config.optimizer.update(learning_rate=3e-3, warmup_steps=60, ema_decay=0.98)
        config.order.update(ar_steps=250, permute_steps=350, max_permuted=8, sbp_steps=30)
        config.training.update(num_steps=400, batch_size=8, log_every=10, eval_every=200, eval_batches=20)
        config.training.update(checkpoint_every=100)
        return config
    return experiment_file.plain_or_smoke(config, arg)
