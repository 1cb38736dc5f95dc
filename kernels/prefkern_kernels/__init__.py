"""prefkern's Triton kernels, and nothing else: torch, triton, the standard library, itself.

The way from hidden states to gradients, with products by the device's own library between them:

    product -> `fold` -> (`rescale_rows`, product) -> `finish` -> log-probs, D
    `product_fold` -> `finish` -> log-probs                      no gradient: one kernel
    log-probs -> `pair_loss` -> a loss, and one coefficient a sequence
    D -> `scatter_scaled` -> dH
    the fold's weights, kept and `settle`d -> product -> dW      trained head, as memory allows
    product -> `remake_weights` -> product -> dW                 trained head, elsewhere

A divergence from a reference takes the same way with a second tile of its raw products: `fold` and
`remake_weights` take both, and `scatter_scaled` adds the divergence's part of dH.

One kernel a file, its launcher beside it under the same name. `launches` counts them.
"""

from .finish import finish
from .fold import fold
from .launches import launches
from .pair import PairLossOutput, pair_loss
from .primitives import INTERPRET
from .product_fold import (
    product_fold,
    product_fold_bytes,
    product_fold_row,
    tune_product_fold,
)
from .remake_weights import remake_weights
from .rescale import rescale_rows
from .scatter_scaled import scatter_scaled
from .settle import settle

__all__ = [
    "INTERPRET",
    "PairLossOutput",
    "finish",
    "fold",
    "launches",
    "pair_loss",
    "product_fold",
    "product_fold_bytes",
    "product_fold_row",
    "remake_weights",
    "rescale_rows",
    "scatter_scaled",
    "settle",
    "tune_product_fold",
]
