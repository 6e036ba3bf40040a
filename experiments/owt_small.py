"""OpenWebText, GPT-2 small size (12 x 768 x 12), length 1024, batch 512: the paper's main setting.

Command:   armd train --config=experiments/owt_small.py --config.data.path=GLOB --config.data.tokenizer=GPT2
               --workdir=runs/owt_small
           GLOB matches .jsonl(.gz) shards with a `text` field; GPT2 holds vocab.json and merges.txt.
Hardware:  a TPU v5e-16 or 8 GPUs of 80 GB. `armd compile --topology=v5e:4x4`: peak 5.7 of 16 GiB a chip, predicted
           302 ms a step at best (55% MFU, limited by memory).
Paper:     zero-shot perplexity (LAMBADA / WikiText2 / PTB / WikiText103 / 1BW) after 180K steps
           44.66 / 36.25 / 130.31 / 35.66 / 53.18, after 400K 45.35 / 35.64 / 123.43 / 35.15 / 52.94
           (GPT-2: 45.04 / 42.43 / 138.43 / 41.60 / 75.20).
Order:     i_AR = 9K, i_perm = 48K, rho = 32 (the paper's). AdamW 3e-4, constant after 2,500 steps, EMA 0.9999.
"""

from ml_collections import ConfigDict

from armd_jax import config as configs
from armd_jax import experiment_file


def get_config(arg: str = "") -> ConfigDict:
    """`smoke`: under a minute on two cores, on the embedded corpus."""
    config = configs.default_config_dict()
    config.data.update(path="openwebtext", tokenizer="gpt2")  # folders here, where the flags name no others
    config.model.update(max_length=1024, num_layers=12, two_stream_layers=6, width=768, num_heads=12, dropout=0.1)
    config.order.update(ar_steps=9_000, permute_steps=48_000, max_permuted=32)
    config.training.update(num_steps=400_000, batch_size=512, eval_every=5_000, checkpoint_every=2_000)
    config.model.remat = "dots"
    config.training.update(microbatches=4, keep_every=20_000)
    return experiment_file.plain_or_smoke(config, arg)
