"""AdaDPO's Listing 1, as printed in the paper: the oracle of the adaptive coefficient."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def listing_1(pi_logps, ref_logps, yw_idx, yl_idx, beta, C=2.0, yw_lens=None, yl_lens=None):
    pi_yw, pi_yl = pi_logps[yw_idx], pi_logps[yl_idx]
    ref_yw, ref_yl = ref_logps[yw_idx], ref_logps[yl_idx]

    lw = yw_lens.float().detach()
    ll = yl_lens.float().detach()
    log_ratio = (
        pi_yw.detach() / lw - pi_yl.detach() / ll - ref_yw.detach() / lw + ref_yl.detach() / ll
    )
    beta_w = beta * torch.clamp(log_ratio.exp(), max=C)

    delta = beta_w * (pi_yw - ref_yw) - beta * (pi_yl - ref_yl)
    return -F.logsigmoid(delta)
