"""A corpus in memory whose tokens say where they stand."""

import pathlib
import types

import numpy as np

SOURCE_STRIDE = 10**6


def counting_corpus(weights: dict[str, float] | None = None, **num_tokens: int) -> types.SimpleNamespace:
    """Gives a corpus whose token i of source s is s * SOURCE_STRIDE + i; all of it is for training.

    Args:
      weights: of the sources; None: 1 each.
      num_tokens: tokens of each source.
    """
    sources = {
        name: types.SimpleNamespace(
            name=name,
            weight=1.0 if weights is None else weights[name],
            tokens={"train": np.arange(number, dtype=np.uint32) + index * SOURCE_STRIDE}.__getitem__,
        )
        for index, (name, number) in enumerate(num_tokens.items())
    }
    return types.SimpleNamespace(sources=sources, directory=pathlib.Path("counting"))
