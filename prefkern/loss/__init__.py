"""The loss on log-probs that are computed in tiles: `FusedPreferenceLoss`, and what explains it.

In reading order: `fused` (the module), `pairwise` (sums of sequences and an objective), `outputs`,
`checks`, `nonfinite` and `diagnostics`.
"""

from prefkern.loss.fused import FusedPreferenceLoss

__all__ = ["FusedPreferenceLoss"]
