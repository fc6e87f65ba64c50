"""How close two correct float32 implementations of this model come, measured, and how tests claim it."""

import jax
import numpy as np

# Products are summed in another order: 2**-24 per term, grown by the residual stream. Against transformers the largest
# differences seen were 1.4e-6 of the largest logit and 4e-6 of a gradient's largest value at 3 layers; the mildest
# mistake (1e-5 for 1e-6 as the latent norms' epsilon) moves logits by 2.6e-5, others by 1e-2 and more.
FLOAT32_VALUES = 1e-5
FLOAT32_GRADIENTS = 5e-5
# The same products grouped otherwise (scan or loop, one device or eight): nothing but the order of sums.
FLOAT32_REORDERED = 5e-6
# bfloat16 keeps 8 bits; errors of a few layers add up.
BFLOAT16_VALUES = 4e-2


def assert_close(actual, expected, tolerance: float, name: str = "values") -> None:
    """Raises AssertionError unless |actual - expected| <= tolerance · max|expected| everywhere and shapes are equal."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if not expected.size:
        return
    error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= tolerance * scale, f"{name}: off by {error:.3g} where values reach {scale:.3g}"


def assert_trees_close(actual: dict, expected: dict, tolerance: float) -> None:
    """Applies `assert_close` leaf by leaf; both trees must have the same keys."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected), "the trees have different keys"
    for path, leaf in jax.tree_util.tree_leaves_with_path(actual):
        expected_leaf = expected
        for key in path:
            expected_leaf = expected_leaf[key.key]
        assert_close(leaf, expected_leaf, tolerance, jax.tree_util.keystr(path, simple=True, separator="/"))
