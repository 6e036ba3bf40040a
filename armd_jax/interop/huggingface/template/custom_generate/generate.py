"""`model.generate`: the usual one, and with `streams=S` text in S streams side by side (strided order)."""

import torch
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def generate(input_ids=None, *, model, inputs=None, streams=None, **kwargs):
    """Token ids [B, P + R]: the prompts and what follows them.

    streams: S; None: transformers' own method. With S streams, R tokens need S + ceil(R / S) - 1 network calls, and
    these arguments count: max_new_tokens or max_length, do_sample, temperature, top_k, top_p, attention_mask (of
    prompts that are padded on the left), eos_token_id (-1: none) and pad_token_id. All R places are written; what is
    behind the first end-of-text is replaced by padding. Without input_ids, one text is written from nothing.
    """
    given = inputs if input_ids is None else input_ids
    for name in ("custom_generate", "trust_remote_code"):
        kwargs.pop(name, None)
    if streams is None:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        return GenerationMixin.generate(model, given, **kwargs)
    return _strided(model, given, int(streams), kwargs)


@torch.no_grad()
def _strided(model, prompt, streams, kwargs):
    config = kwargs.get("generation_config") or model.generation_config

    def setting(name, default):
        for value in (kwargs.get(name), getattr(config, name, None)):
            if value is not None:
                return value
        return default

    if prompt is None:
        prompt = torch.zeros((1, 0), dtype=torch.long, device=model.device)
    batch, width = prompt.shape
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(prompt) if mask is None else mask.to(prompt.dtype)
    if (mask.diff(dim=1) < 0).any():
        raise ValueError("prompts have to be padded on the left")
    num_free = kwargs.get("max_new_tokens")
    if num_free is None:
        num_free = setting("max_new_tokens", None) if kwargs.get("max_length") is None else None
    if num_free is None:
        length = kwargs.get("max_length") or model.config.max_position_embeddings
        num_free = length - width
    known = mask.sum(1, keepdim=True)  # [B, 1]
    if width and (known == 0).any():
        raise ValueError("a prompt is all padding: give texts from nothing a batch of their own")
    if streams < 1 or num_free < 1:
        raise ValueError(f"streams={streams}, {num_free} new tokens: both must be at least 1")
    if int(known.max()) + num_free > model.config.max_position_embeddings:
        raise ValueError(f"{int(known.max())} + {num_free} tokens exceed {model.config.max_position_embeddings}")
    choose = _chooser(setting)
    block_of_free = _blocks(num_free, min(streams, num_free)).to(prompt.device)  # [R], from 1

    # Texts without their padding: what is known of row b are its first known[b] places.
    total = width + num_free
    places = torch.arange(total, device=prompt.device).expand(batch, total)
    shifted = (places[:, :width] + (width - known)).clamp(max=max(width - 1, 0))
    tokens = torch.zeros((batch, total), dtype=prompt.dtype, device=prompt.device)
    tokens[:, :width] = prompt.gather(1, shifted)
    free = places - known
    inside = block_of_free[free.clamp(0, num_free - 1)]
    # Behind the text of a row with a shorter prompt there are places that are no part of it.
    never = torch.iinfo(torch.int32).max
    block_of = torch.where(free < 0, places + 1, torch.where(free < num_free, known + inside, never))

    cache = DynamicCache(config=model.config)
    # The first call reads the prompts: their rows of X, and their rows of G but the first, which is the same always.
    x_places, g_read = places[:, :width], places[:, 1:width]
    x_real, g_real = x_places < known, g_read < known
    for block in range(1, int(block_of_free.max()) + 1):
        chosen = known + (block_of_free == block).nonzero()[:, 0]  # the places that are drawn now, [B, G]
        if block == 1 and width:
            new, new_real = torch.cat([g_read, chosen], dim=1), torch.cat([g_real, chosen >= 0], dim=1)
        elif block == 1:
            new, new_real = chosen[:, :0], chosen[:, :0] >= 0  # the first place of a text is the fixed row's
        else:
            new, new_real = chosen, chosen >= 0
        logits = model.predict(tokens, block_of, (x_places, x_real), (new, new_real), cache)[:, -chosen.shape[1] :]
        tokens.scatter_(1, chosen, choose(logits))
        x_places, x_real = chosen, chosen >= 0
    made = tokens.gather(1, known + torch.arange(num_free, device=prompt.device))
    return torch.cat([prompt, _until_end(made, setting)], dim=1)


def _blocks(num_free, streams):
    """The block of every free place: stream heads one by one, then the next place of all streams at a time.

    Streams differ in length by at most one, longer ones first.
    """
    blocks = []
    for stream in range(streams):
        length = num_free // streams + (stream < num_free % streams)
        blocks += [stream + 1 if depth == 0 else streams + depth for depth in range(length)]
    return torch.tensor(blocks)


def _chooser(setting):
    """A function from logits [B, G, V] to tokens [B, G]."""
    if not setting("do_sample", False):
        return lambda logits: logits.argmax(-1)
    warpers = [
        warper(value)
        for warper, name, off in (
            (TemperatureLogitsWarper, "temperature", 1.0),
            (TopKLogitsWarper, "top_k", 0),
            (TopPLogitsWarper, "top_p", 1.0),
        )
        if (value := setting(name, off)) != off
    ]

    def draw(logits):
        flat = logits.flatten(0, 1)
        for warper in warpers:
            flat = warper(None, flat)
        return torch.multinomial(flat.softmax(-1), 1)[:, 0].unflatten(0, logits.shape[:2])

    return draw


def _until_end(made, setting):
    end = setting("eos_token_id", -1)
    ends = torch.isin(made, torch.as_tensor(end, device=made.device))
    behind = ends.cumsum(1) - ends.long() > 0
    pad = setting("pad_token_id", end if isinstance(end, int) else end[0])
    return made.masked_fill(behind, pad)
