"""armd-jax: Auto-Regressive Masked Diffusion language models in JAX. Names resolve on first use."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "armd_jax.interop.load",
    "LanguageModel": "armd_jax.inference.language_model",
    "Generation": "armd_jax.inference.language_model",
    "Config": "armd_jax.config",
    "ModelConfig": "armd_jax.config",
    "UserError": "armd_jax.errors",
    "Order": "armd_jax.core.order",
    "per_token_logps": "armd_jax.core.objective",
}
_MODULES = {
    "order": "armd_jax.core.order",
    "block_mask": "armd_jax.core.block_mask",
    "network": "armd_jax.core.network",
    "objective": "armd_jax.core.objective",
    "parameters": "armd_jax.core.parameters",
}
__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'armd_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
