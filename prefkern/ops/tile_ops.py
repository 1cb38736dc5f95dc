"""What a backend does to a tile: the functions that the passes call, whichever backend runs.

`prefkern_kernels` has them in Triton and `torch_tiles` in torch, with the same arguments in the
same order, which are described there. A tile is n tokens by v entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class TileOps(Protocol):
    """A module with these functions; each writes into its arguments and returns nothing."""

    fold: Callable[..., None]  # a tile, or a pair of tiles, into each token's state
    rescale_rows: Callable[..., None]  # the accumulator of a second product, where a maximum rose
    finish: Callable[..., None]  # a state into log-probs, D, and what a trained head needs
    settle: Callable[..., None]  # kept probabilities of a token to one unit
    remake_weights: Callable[..., None]  # a tile, or a pair, into the loss's gradient
    scatter_scaled: Callable[..., None]  # scaled rows of D to their places
