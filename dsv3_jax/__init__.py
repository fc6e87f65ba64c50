"""DeepSeek-V3 in JAX."""

import importlib

__all__ = ["LanguageModel", "load_checkpoint", "load_hf"]


def __getattr__(name: str):
    """Loads the notebook face on first use, so that importing one module does not import all."""
    if name in __all__:
        return getattr(importlib.import_module("dsv3_jax.language_model"), name)
    raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")
