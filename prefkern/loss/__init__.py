"""The loss on log-probs computed in tiles: `FusedPreferenceLoss`, and diagnostics of it.

In reading order: `fused` (the module), `arguments` (of a call), `pairwise` (sums of sequences and an
objective), `outputs`, `checks`, `nonfinite` and `diagnostics`.
"""

from prefkern.loss.fused import FusedPreferenceLoss

__all__ = ["FusedPreferenceLoss"]
