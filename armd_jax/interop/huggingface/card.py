"""The model card: README.md of an export for transformers, filled from what is known of the model."""

import dataclasses

from armd_jax.config import ModelConfig
from armd_jax.interop.huggingface.native import Native

# The facts of CITATION.cff, which is not installed with the package.
CITATION = """```bibtex
@inproceedings{karami2026armd,
  title     = {Auto-Regressive Masked Diffusion Models},
  author    = {Karami, Mahdi and Ghodsi, Ali},
  booktitle = {International Conference on Artificial Intelligence and Statistics (AISTATS)},
  series    = {Proceedings of Machine Learning Research},
  volume    = {300},
  year      = {2026},
  url       = {https://arxiv.org/abs/2601.16971}
}
@software{armd_jax,
  title   = {armd-jax: Auto-Regressive Masked Diffusion language models in JAX},
  author  = {{The armd-jax authors}},
  version = {0.1.0},
  license = {Apache-2.0}
}
```"""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the card says beside the model itself. Empty or None: it is not known.

    data: the text that it was trained on, without folders of this machine. start: the name of the model whose weights
    training started from. orders: what it was trained on, in words. step: of the checkpoint. average: whether its
    weights are the moving average. split: of the figures. figures: name, nats per token and bits per byte of each
    figure, for people.
    """

    data: str = ""
    start: str = ""
    orders: str = ""
    step: int | None = None
    average: bool = False
    split: str = ""
    figures: tuple[tuple[str, str, str], ...] = ()


_REMOTE = """`import torch, transformers` (transformers 5; the code is in this folder, so read it before you trust it):

```python
model = transformers.AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained("DIR", trust_remote_code=True)
ids = tokenizer("The old tree", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32, do_sample=True, streams=4)[0]))
```

- `model.log_prob(ids)` gives the exact log-probability of every token, in nats. The model has a start token of its own:
  no bos is put before a text, and `logits[:, t]` are for token t + 1, as in other causal models.
- `model.log_prob(ids, positions, blocks)` scores under any order: the natural positions in the sequence in which they
  are predicted, and the number of the block of each, from 1. The tokens of a block are predicted together.
- `model.generate(...)` is the usual one. With `streams=S` it writes S places at a time: S + ceil(R / S) - 1 network
  calls for R tokens. Prompts of different lengths are padded on the left."""

_NATIVE = """It is a network of transformers itself and needs no code from here (`import torch, transformers`):

```python
model = transformers.AutoModelForCausalLM.from_pretrained("DIR").eval()
tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained("DIR")
ids = torch.tensor([[{bos}, *tokenizer("The old tree").input_ids]])
print(tokenizer.decode(model.generate(ids, max_new_tokens=32, do_sample=True)[0, 1:]))
```

Every text begins with token {bos}, whose vector the model was trained to start from; put it before your tokens. (For
Qwen's types, AutoTokenizer takes Qwen's rules for words, whatever tokenizer.json says. The class above does not.)"""


def page(config: ModelConfig, made: Native | None, dtype: str, facts: Facts) -> str:
    """The model card."""
    kind = "remote code" if made is None else str(made.fields["architectures"][0])
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    front += ["- armd", "- masked-diffusion" if made is None else "- autoregressive", "---"]
    rows = [
        ("network", f"{config.num_layers} layers ({config.two_stream_layers} two-stream), width {config.width},"
         f" {config.num_heads} heads, {kind}"),
        ("vocabulary, longest text", f"{config.vocab_size:,} tokens, {config.max_length:,} tokens"),
        ("weights", dtype + (", moving average of training" if facts.average else "")),
    ]  # fmt: skip
    rows += [("trained on", facts.data)] if facts.data else []
    rows += [("started from the weights of", facts.start)] if facts.start else []
    rows += [("orders", facts.orders)] if facts.orders else []
    rows += [("steps", f"{facts.step:,}")] if facts.step is not None else []
    about = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    use = _REMOTE if made is None else _NATIVE.format(bos=made.bos)
    parts = ["\n".join(front), "# An ARMD language model", about]
    if facts.figures:
        table = ["| | nats per token | bits per byte |", "|---|---|---|"]
        table += [f"| {name} | {nats} | {bits} |" for name, nats, bits in facts.figures]
        parts += ["## Likelihoods", f"Of the split `{facts.split}`, as `armd eval` measured them:", "\n".join(table)]
    parts += ["## How to use it", use]
    back = '`armd.load("DIR")`' if made is None else "`armd import --from=DIR --aggregator=shift --out=NEW`"
    parts += [f"In JAX, {back} reads the same weights. `sha256sum -c SHA256SUMS` checks all files."]
    parts += ["## How to cite", CITATION]
    return "\n\n".join(parts) + "\n"
