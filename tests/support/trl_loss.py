"""TRL's loss of a pair, by its own `_compute_loss` and without a model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch


def per_token(pair, w, l):
    """Rows of equal log-probabilities that sum to w and l; [2, T], zero past each length."""
    mask = torch.arange(max(pair.n_w, pair.n_l)) < torch.tensor([[pair.n_w], [pair.n_l]])
    return torch.stack([w / pair.n_w, l / pair.n_l])[:, None] * mask, mask


def trl_state(tokens, mask, log_sum_sq, **options):
    """The attributes, model output and batch that TRL's trainers read."""
    outputs = SimpleNamespace(
        log_probs=tokens,
        log_sum_sq_probs=log_sum_sq,
        entropy=torch.zeros_like(tokens),
        mean_logits=torch.zeros_like(tokens),
        is_top1=mask,
    )
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    state = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)},
        **options,
    )
    # The prompt is one token.
    completion_mask = torch.nn.functional.pad(mask.long(), (1, 0))
    batch = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    return state, lambda **_: outputs, batch


def trl_dpo(
    pair,
    w,
    l,
    loss_types,
    beta,
    log_sum_sq=None,
    label_smoothing=0.0,
    f_divergence_type="reverse_kl",
    f_alpha_divergence_coef=0.5,
):
    """The loss of TRL's DPOTrainer, from its own code, on a pair with w and l as its log-probs."""
    from trl import DPOTrainer

    tokens, mask = per_token(pair, w, l)
    state, model, batch = trl_state(
        tokens,
        mask,
        log_sum_sq,
        beta=beta,
        loss_types=list(loss_types),
        loss_weights=list(loss_types.values()),
        label_smoothing=label_smoothing,
        use_weighting=log_sum_sq is not None,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        args=SimpleNamespace(discopop_tau=0.05),
        ld_alpha=None,
    )
    reference = torch.tensor(pair[2:4], dtype=w.dtype)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = reference.chunk(2)
    return DPOTrainer._compute_loss(state, model, batch, return_outputs=False)
