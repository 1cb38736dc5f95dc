"""prefkern's Triton kernels, and nothing else: torch, triton, the standard library, itself.

The way from hidden states to gradients, with products by the device's own library between them:

    product -> `fold` -> (`rescale_rows`, product) -> log-probs and D      one pass, frozen head
    `product_fold` -> log-probs                            no gradient: product and fold in one
    log-probs -> `pair_loss` -> a loss, and one coefficient a sequence
    product -> `logits_gradient` -> two products -> dH and dW              second pass, trained head

With a divergence from a reference, whose logits are a second product over the same words:

    two products -> `fold_kl` -> (`rescale_rows`, product) twice -> log-probs, kl and both D
    two products -> `kl_gradient` -> two products -> dH and dW

One kernel a file, its launcher beside it under the same name. `launches` counts them.
"""

from .fold import fold
from .fold_kl import fold_kl
from .kl_gradient import kl_gradient
from .launches import launches
from .logits_gradient import logits_gradient
from .pair import PairLossOutput, pair_loss
from .primitives import INTERPRET
from .product_fold import product_fold, product_fold_bytes, tune_product_fold
from .rescale import rescale_rows

__all__ = [
    "INTERPRET",
    "PairLossOutput",
    "fold",
    "fold_kl",
    "kl_gradient",
    "launches",
    "logits_gradient",
    "pair_loss",
    "product_fold",
    "product_fold_bytes",
    "rescale_rows",
    "tune_product_fold",
]
