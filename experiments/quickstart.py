"""wip"""

from armd_jax import config as configs


def get_config(arg=""):
    config = configs.default_config_dict()
    config.data.vocab_size = 2048
    config.model.update(
        max_length=256, num_layers=4, two_stream_layers=2, width=192, num_heads=6, dropout=0.0, positional_width=64
    )
    config.optimizer.update(
        learning_rate=3e-3, warmup_steps=50, schedule="cosine", weight_decay=0.1, beta2=0.95, ema_decay=0.98
    )
    config.order.update(ar_steps=200, permute_steps=600, max_permuted=8, sbp_steps=100, streams=(1, 2, 4, 8))
    config.training.update(num_steps=1000, batch_size=16, log_every=20, eval_every=250, checkpoint_every=500)
    return configs.smoke(config) if arg == "smoke" else config
