"""Whether a batch and a model can be divided over a mesh."""

from jax.sharding import Mesh

from armd_jax.config import Config, ModelConfig
from armd_jax.core.sizes import mlp_width, padded_vocab
from armd_jax.errors import UserError


def check(config: Config, mesh: Mesh) -> None:
    """Raises UserError if batch, width, heads, MLP or vocabulary cannot be divided over the mesh."""
    batch_parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.training.batch_size // config.training.microbatches
    if rows % batch_parts:
        raise UserError(
            f"training.batch_size / training.microbatches = {rows} is not divisible by mesh data x fsdp = {batch_parts}"
        )
    check_model(config.model, mesh)


def check_model(model: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError if width, heads, MLP or vocabulary cannot be divided over the mesh."""
    for field, size, axis in (
        ("model.width", model.width, "fsdp"),
        ("model.num_heads", model.num_heads, "tensor"),
        ("model.num_kv_heads", model.kv_heads, "tensor"),
        ("model.mlp_width", mlp_width(model), "tensor"),
        ("the padded vocabulary", padded_vocab(model), "tensor"),
    ):
        if size % mesh.shape[axis]:
            raise UserError(f"{field}={size} is not divisible by mesh.{axis}={mesh.shape[axis]}")
