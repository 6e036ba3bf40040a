"""Logical axes: names for the axes of parameters and activations.

`training.sharding` has the table from these names to the axes of a mesh. What is not listed here (norms, biases, the
start token) is small and lies whole on every device.
"""

Axes = tuple[str | None, ...]  # one name per axis; None: never sharded

# Of every parameter that may be sharded, by the last part of its name. Stacked layers have one more axis in front.
PARAMETERS: dict[str, Axes] = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "query": ("embed", "heads", None),
    "key_value": ("embed", None, "heads", None),
    "attention_out": ("heads", None, "embed"),
    "mlp_in": ("embed", "mlp"),
    "mlp_gate": ("embed", "mlp"),
    "mlp_out": ("mlp", "embed"),
    "left": (None, "embed"),
    "right": (None, "embed"),
}
ROWS: Axes = ("batch", "length", "embed")
# Whole on every device: XLA would cut them like the rows below, and RoPE's tables with them, which each layer needs.
PLACES: Axes = ("batch", "length")
FIRST_ROWS: Axes = ("batch", "targets", "embed")  # as the aggregator makes them, each for itself
LOGITS: Axes = ("batch", "length", "vocab")
