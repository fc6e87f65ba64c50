"""Sizes that tilings and layouts get wrong."""

# Rows: none, one, fewer than a tile, one more than a tile of 128.
ROWS = (0, 1, 7, 129)
