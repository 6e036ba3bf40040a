"""A Hugging Face GPT-2 in training, for `learning.py`: torch throughout, with the same data and the same recipe.

The model is transformers' own: learned positions, its own initialisation, tied embeddings, MLPs four times as wide as
the model. Dropout is 0, as in the models that it is compared with. A begin token stands in front of every row and the
last token of the row is left out, so that it predicts the same N tokens of each row as the models of this package.
"""

import contextlib
import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from common import num_cores

from armd_jax.config import Config, ModelConfig
from armd_jax.data import loader
from armd_jax.data.packing import PreparedData
from armd_jax.training import optimizer


class Gpt2Learner:
    """GPT-2 of the size of `config.model`, trained as `config.optimizer` says; it runs on the GPU if there is one."""

    def __init__(self, config: Config, data: PreparedData) -> None:
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(num_cores())
        torch.manual_seed(config.training.seed)
        self._config, self._data, self._step = config, data, 0
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = transformers.GPT2LMHeadModel(gpt2_config(config.model)).to(self._device).train()
        self._average = copy.deepcopy(self._model).eval() if config.optimizer.ema_decay else None
        self.num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self._parameters = list(self._model.parameters())  # tied ones once
        self._averages = list(self._average.parameters()) if self._average is not None else []
        settings = config.optimizer
        # The same rule as for the models of this package: matrices inside the layers decay, nothing else does.
        inside = [p for name, p in self._model.named_parameters() if ".h." in name and p.ndim == 2]
        tables = [self._model.transformer.wte.weight, self._model.transformer.wpe.weight]
        chosen = set(map(id, [*inside, *tables]))
        others = [p for p in self._parameters if id(p) not in chosen]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": inside, "weight_decay": settings.weight_decay, "factor": 1.0},
                {"params": tables, "weight_decay": 0.0, "factor": settings.embedding_rate},
                {"params": others, "weight_decay": 0.0, "factor": 1.0},
            ],
            lr=optimizer.peak_rate(config),
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )
        schedule = optimizer.learning_rate(config)
        self._rates = np.asarray(jax.vmap(schedule)(jnp.arange(config.training.num_steps)), float)

    def update(self, tokens_BN: np.ndarray) -> None:
        """Makes one update and returns when it is finished."""
        settings, count = self._config.optimizer, self._config.training.microbatches
        for group in self._optimizer.param_groups:
            group["lr"] = self._rates[self._step] * group["factor"]
        self._optimizer.zero_grad(set_to_none=True)
        for part in torch.from_numpy(np.asarray(tokens_BN, np.int64)).to(self._device).chunk(count):
            (self._nats(self._model, part).mean() / count).backward()
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, settings.clip_norm)
        self._optimizer.step()
        if self._averages:
            decay = min(settings.ema_decay, (1 + self._step) / (10 + self._step))
            with torch.no_grad():
                torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)
        self._step += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def held_out(self) -> float:
        """Nats per token on the validation split, of the average of the weights if there is one."""
        model = (self._model if self._average is None else self._average).eval()
        nats, count = 0.0, 0
        for tokens_BN, valid_BN in loader.eval_batches(self._data, "valid", self._config.training.batch_size):
            each = self._nats(model, torch.from_numpy(np.asarray(tokens_BN, np.int64)).to(self._device))
            counted = torch.from_numpy(valid_BN).to(self._device).flatten()
            nats += float(each[counted].double().sum())
            count += int(counted.sum())
        self._model.train()
        return nats / count

    def _nats(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """-log p of every token, flattened. The begin token is no candidate, because no text holds it."""
        begin = self._config.model.vocab_size
        inputs = torch.cat([torch.full_like(tokens[:, :1], begin), tokens[:, :-1]], dim=1)
        on_gpu = self._device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            hidden = model.transformer(input_ids=inputs, use_cache=False).last_hidden_state
            logits = F.linear(hidden.flatten(0, 1), model.lm_head.weight[:begin])
        return F.cross_entropy(logits.float(), tokens.flatten(), reduction="none")


def gpt2_config(model: ModelConfig) -> transformers.GPT2Config:
    """GPT-2's config for a model's layers, width, heads, length and vocabulary; one more token begins every row."""
    return transformers.GPT2Config(
        n_layer=model.num_layers,
        n_embd=model.width,
        n_head=model.num_heads,
        n_positions=model.max_length,
        vocab_size=model.vocab_size + 1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=model.vocab_size,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
