"""Which blocks of keys and queries meet when documents packed into one sequence do not see each other.

Every query names the first key that it sees, the beginning of its document; along a sequence these never fall. So the
keys of a tile of queries, and the queries of a tile of keys, are one range of blocks, and only its ends need a mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class BlockRanges(NamedTuple):
    """Ranges of blocks, int32 [B, tiles]."""

    whole_BM: jax.Array  # where the blocks begin (for queries) or end (for keys) that need no mask but the causal one
    edge_BM: jax.Array  # where the blocks to visit begin (for queries) or end (for keys)


def key_blocks(first_key_BT: jax.Array, *, tile: int, block: int) -> BlockRanges:
    """Returns, for tiles of queries, the blocks of keys from edge on; from whole on every query sees all keys.

    Both at most the first block that the causal mask cuts.
    """
    first_causal_M = jnp.arange(0, first_key_BT.shape[1], tile) // block
    edge_BM = first_key_BT[:, ::tile] // block
    whole_BM = -(-first_key_BT[:, tile - 1 :: tile] // block)
    return BlockRanges(jnp.minimum(whole_BM, first_causal_M), edge_BM)


def query_blocks(first_key_BT: jax.Array, *, tile: int, block: int) -> BlockRanges:
    """Returns, for tiles of keys, the blocks of queries up to edge; up to whole every query sees all keys.

    Both at least one more than the block of queries where the tile itself lies; tile and block are equal.
    """
    first_keys_M = jnp.arange(0, first_key_BT.shape[1], tile)
    count = jax.vmap(lambda first_key_T, keys_M: jnp.searchsorted(first_key_T, keys_M, side="right"), (0, None))
    num_seeing_last_BM = count(first_key_BT, first_keys_M + tile - 1)
    num_seeing_all_BM = count(first_key_BT, first_keys_M)
    own_M = first_keys_M // block + 1
    return BlockRanges(
        jnp.maximum(num_seeing_all_BM // block, own_M).astype(jnp.int32),
        (-(-num_seeing_last_BM // block)).astype(jnp.int32),
    )
