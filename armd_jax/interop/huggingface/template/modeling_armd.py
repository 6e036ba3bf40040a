"""ARMD (Auto-Regressive Masked Diffusion language model) for Hugging Face transformers."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .network_armd import NEVER, START, UNSEEN, ArmdModel, ArmdPreTrainedModel, Rows

# transformers called the cache past_key_values up to 5.23.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class ArmdForCausalLM(ArmdPreTrainedModel, GenerationMixin):
    """An ARMD with its head.

    `forward(input_ids)` is that of a causal language model: logits[:, t] are for token t + 1. The model's own start
    token stands before the text, so no bos is given, and no logits come for the first token; `log_prob` has its
    probability too. `forward(input_ids, order=(positions, blocks))` gives logits[:, j] for the token at position j
    itself, from the tokens of earlier blocks.
    """

    accepts_loss_kwargs = False  # a Trainer divides the loss by its own number of batches
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = ArmdModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        order=None,
        labels=None,
        cache=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        """Logits [B, T, V] float32, and with labels the mean loss in nats; labels of -100 do not count.

        input_ids: [B, T]. attention_mask: [B, T], or with a cache of all tokens so far; 0 at padding, on either side.
        order: (positions, blocks), each [T] or [B, T] in generation order: which natural position comes at each place,
            and the number of its block, from 1 and never falling. Tokens of a block are predicted together.
        """
        if order is not None:
            if attention_mask is not None and not attention_mask.all():
                raise ValueError("order: texts with padding have no order; give each length a batch of its own")
            logits = self.logits(input_ids, *order)
            loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return CausalLMOutputWithPast(loss=loss, logits=logits)
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and labels is None:
            cache = DynamicCache(config=self.config)
        h = self.model(self._left_to_right(input_ids, attention_mask, cache), cache)[:, 1:]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self._head(h if isinstance(keep, int) else h[:, keep])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if return_dict is False:
            return tuple(a for a in (loss, logits, cache) if a is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache})

    def logits(self, tokens, positions=None, blocks=None):
        """Logits [B, N, V] at natural positions: row j is for the token at position j, given all earlier blocks."""
        batch, length = tokens.shape
        self._check_length(length)
        default = torch.arange(length, device=tokens.device)
        positions = (default if positions is None else positions).expand(batch, length)
        blocks = (default + 1 if blocks is None else blocks).expand(batch, length)
        self._check_order(positions, blocks)
        rank = positions.argsort(dim=1)
        block_of = blocks.gather(1, rank)  # at natural positions
        start = torch.zeros_like(tokens[:, :1])
        natural = torch.arange(length, device=tokens.device).expand(batch, length)
        left, right = self.neighbours(tokens, block_of, natural)
        rows = Rows(
            x_tokens=torch.cat([start + START, tokens], dim=1),
            x_positions=torch.cat([start, natural + 1], dim=1),
            x_blocks=torch.cat([start, block_of], dim=1),
            g_positions=natural + 1,
            g_blocks=block_of,
            g_left=left,
            g_right=right,
        )
        return self._head(self.model(rows))

    def _check_length(self, length):
        """Raises ValueError if a text is longer than the model has positions for."""
        if length > self.config.max_position_embeddings:
            raise ValueError(f"{length} tokens exceed {self.config.max_position_embeddings}")

    def log_prob(self, tokens, positions=None, blocks=None):
        """log p of every token [B, N] float32, in nats, at natural positions; exact, in one pass.

        tokens: [B, N]. positions, blocks: an order as in `forward`; default: left to right, one token per block. The
        sum over a row is the log-probability of the text under the order.
        """
        log_p = self.logits(tokens, positions, blocks).log_softmax(-1)
        return log_p.gather(-1, tokens[..., None])[..., 0]

    def neighbours(self, tokens, block_of, places):
        """The tokens to the left and right of `places` [B, G], of which an earlier block holds them.

        tokens, block_of: [B, N] at natural positions.
        """
        length, own = tokens.shape[1], block_of.gather(1, places)

        def beside(at):
            inside = at.clamp(0, length - 1)
            seen = (at < length) & (block_of.gather(1, inside) < own)
            found = torch.where(seen, tokens.gather(1, inside), UNSEEN)
            return torch.where(at < 0, START, found)

        return beside(places - 1), beside(places + 1)

    def predict(self, tokens, block_of, known, wanted, cache):
        """One call of a sampler: logits of the first place and of the wanted ones [B, 1 + G, V].

        tokens, block_of: [B, N] at natural positions; blocks from 1. known: the places whose tokens are new since the
        last call [B, X], and which of them are no padding. wanted: likewise, the places to predict [B, G].
        """
        (x_places, x_real), (g_places, g_real) = known, wanted
        zero = torch.zeros_like(tokens[:, :1])
        left, right = self.neighbours(tokens, block_of, torch.cat([zero, g_places], dim=1))
        x_blocks, g_blocks = block_of.gather(1, x_places), block_of.gather(1, g_places)
        rows = Rows(
            x_tokens=torch.cat([zero + START, tokens.gather(1, x_places)], dim=1),
            x_positions=torch.cat([zero, x_places + 1], dim=1),
            x_blocks=torch.cat([zero, x_blocks.masked_fill(~x_real, NEVER)], dim=1),
            g_positions=torch.cat([zero, g_places], dim=1) + 1,
            g_blocks=torch.cat([zero + 1, g_blocks.masked_fill(~g_real, NEVER)], dim=1),
            g_left=left,
            g_right=right,
            fixed=1,
        )
        return self._head(self.model(rows, cache))

    def _check_order(self, positions, blocks):
        length = positions.shape[1]
        if (positions.sort(dim=1).values != torch.arange(length, device=positions.device)).any():
            raise ValueError(f"positions: every row must be a permutation of 0 .. {length - 1}")
        steps = blocks.diff(dim=1, prepend=torch.zeros_like(blocks[:, :1]))
        if not ((steps == 0) | (steps == 1)).all() or (length and (blocks[:, 0] != 1).any()):
            raise ValueError("blocks: must begin at 1 and grow in steps of 0 or 1")

    def _head(self, h):
        logits = self.lm_head(h).float()
        cap = self.config.logit_cap
        return cap * torch.tanh(logits / cap) if cap else logits

    def _left_to_right(self, ids, mask, cache):
        """Rows for tokens [B, T] behind those in the cache: the fixed first ones, and for every token its row of X and
        the row of G that predicts the token after it."""
        past = 0 if cache is None else cache.get_seq_length()
        batch, length = ids.shape
        if mask is None:
            # Without a mask, no token of this call is padding. How many there were before, the cache knows.
            valid = torch.ones_like(ids)
            before = torch.full_like(ids[:, :1], 0)
            if past:
                blocks = cache.layers[self.config.num_hidden_layers].keys[:, 0, :, 2]
                before = (blocks != NEVER).sum(1, keepdim=True)
        else:
            valid = mask[:, -length:].to(ids.dtype)
            before = mask[:, : mask.shape[1] - length].to(ids.dtype).sum(1, keepdim=True)
        number = before + valid.cumsum(1)  # of the token, from 1
        real = valid.bool()
        zero = torch.zeros_like(ids[:, :1])
        return Rows(
            x_tokens=torch.cat([zero + START, ids], dim=1),
            x_positions=torch.cat([zero, number], dim=1),
            x_blocks=torch.cat([zero, number.masked_fill(~real, NEVER)], dim=1),
            g_positions=torch.cat([zero + 1, number + 1], dim=1),
            g_blocks=torch.cat([zero + 1, (number + 1).masked_fill(~real, NEVER)], dim=1),
            g_left=torch.cat([zero + START, ids], dim=1),
            g_right=torch.full_like(torch.cat([zero, ids], dim=1), UNSEEN),
            fixed=1,
        )
