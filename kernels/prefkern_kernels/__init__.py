"""prefkern's Triton kernels. They import torch, triton and the standard library, and nothing else.

The way from hidden states to gradients. The device's own library makes the products between them:

    product -> `fold` -> (`rescale_rows`, product) -> `finish` -> log-probs, D
    `product_fold` -> `finish` -> log-probs                      no gradient: one kernel
    log-probs -> `pair_loss` -> a loss, and one coefficient a sequence
    D -> `scatter_scaled` -> dH
    the fold's weights, kept and `settle`d -> product -> dW      trained head, as memory allows
    product -> `remake_weights` -> product -> dW                 trained head, elsewhere

A divergence from a reference goes the same way, with a second tile for the reference's raw
products: `fold` and `remake_weights` take both tiles, and `scatter_scaled` adds the divergence's
part of dH.

Each file has one kernel, and its launcher under the same name. `launches` counts the launches.
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
