"""What is known of the attention of a compiled training step and does not stand in the program's text.

Chunked attention loops over as many chunks of keys as the queries of a chunk can see, which depends on data. The splash
kernel is one instruction, whatever its mask.
"""

import re
from collections.abc import Callable

from armd_jax.compilation.hlo import Instruction
from armd_jax.config import Config
from armd_jax.core.context import LayerGroup
from armd_jax.core.kernels.attention import KEY_CHUNKS
from armd_jax.names import kernel_fault
from armd_jax.order_config import block_patterns

_LOOP = re.compile(rf'op_name="[^"]*{KEY_CHUNKS}(\d+)/while"')


def iterations(config: Config) -> Callable[[Instruction], float | None]:
    """How often the loops of chunked attention over C chunks of keys run on average; None for every other loop.

    (C + 1) / 2 under a generation order, in which the i-th chunk of queries sees the first i chunks of keys, up to the
    size of a block; fewer if documents are kept apart (`data.reset`), which depends on the text. C in a denoiser, whose
    queries see the whole row.
    """

    def of_loop(loop: Instruction) -> float | None:
        if not (found := _LOOP.search(loop.attributes)):
            return None
        chunks = int(found[1])
        return (chunks + 1) / 2 if config.model.has_orders else float(chunks)

    return of_loop


def splash_forward_flops(config: Config) -> float:
    """FLOPs of one forward pass of the splash kernels over the whole batch, in all layers together.

    The kernel computes a tile of the scores whole if any of it is visible, so these are more than the visible pairs of
    query and key: 1.5 times as many at N = 1024, whose tiles are 512 wide. If orders have several block patterns, this
    is the mean over them. 0 if the blocks are drawn or the rows have a length for which there is no such kernel.
    """
    from armd_jax.core.kernels import splash  # imports Pallas

    model = config.model
    layers: dict[LayerGroup, int] = {"bidirectional": model.num_layers}
    patterns: tuple[int, ...] | None = (1,)
    if model.has_orders:
        two_stream = model.two_stream_layers
        layers = {
            "two_stream": max(two_stream - 1, 0),
            "last_two_stream": min(two_stream, 1),
            "causal": model.num_layers - two_stream,
        }
        patterns = block_patterns(config.order)
    if patterns is None or kernel_fault("splash", model.max_length, model.head_width):
        return 0.0
    tables = [splash.computed_pairs(model.max_length, streams) for streams in patterns]
    pairs = sum(count * table[group] for group, count in layers.items() for table in tables) / len(tables)
    return 4.0 * model.num_heads * model.head_width * pairs * config.training.batch_size
