"""TRL's loss of a pair, by its own `_compute_loss` and without a model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch


def per_token(pair, w, l):
    """Rows of equal log-probabilities that sum to w and l; [2, T], zero past each length."""
    mask = torch.arange(max(pair.n_w, pair.n_l)) < torch.tensor([[pair.n_w], [pair.n_l]])
    return torch.stack([w / pair.n_w, l / pair.n_l])[:, None] * mask, mask


def logits_of(log_probs, mask, share=0.5):  # (B, T, 3)
    """Logits, already normalised, in which token 0 has these log-probabilities.

    The rest of the probability goes to two other tokens, the first of which gets `share` of it.
    """
    first = log_probs.where(mask, -1.0)
    rest = torch.log(-torch.expm1(first))
    share = torch.as_tensor(share, dtype=first.dtype).expand_as(first)
    return torch.stack([first, rest + share.log(), rest + torch.log1p(-share)], -1)


def trl_output(log_probs, mask, share=0.5):
    """What a model gives to TRL's trainers: to those of today, and to those that take logits."""
    logits = logits_of(log_probs, mask, share)
    return SimpleNamespace(
        # There is a place more than tokens that are scored: the last one's next token is not given.
        logits=torch.nn.functional.pad(logits, (0, 0, 0, 1)),
        log_probs=log_probs,
        log_sum_sq_probs=torch.logsumexp(2 * logits.detach(), -1),
        entropy=torch.zeros_like(log_probs),
        mean_logits=torch.zeros_like(log_probs),
        is_top1=mask,
    )


class Says(torch.nn.Module):
    """A model that gives `output`, whatever it gets."""

    is_gradient_checkpointing = False

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, **_):
        return self.output


def trl_state(mask, loss_types=(), **options):
    """The attributes and the batch that TRL's trainers read; loss types by their weights."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    given = {
        "model": SimpleNamespace(training=False),
        "accelerator": accelerator,
        "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "loss_types": list(loss_types),
        "loss_weights": [*dict(loss_types).values()],
        "label_smoothing": 0.0,
        "use_weighting": False,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "_total_train_tokens": 0,
        "_metrics": {"eval": defaultdict(list)},
    }
    # The prompt is one token, and each token is 0.
    completion_mask = torch.nn.functional.pad(mask.long(), (1, 0))
    batch = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    return SimpleNamespace(**given | options), batch


def trl_batch(log_probs, mask, ref_logps, loss_types, share=None, **options):
    """The loss of TRL's DPOTrainer, from its own code, on rows of log-probabilities.

    With `share`, the losses have WPO's weights: see `logits_of`.
    """
    from trl import DPOTrainer

    state, batch = trl_state(mask, loss_types, use_weighting=share is not None, **options)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = ref_logps.chunk(2)
    output = trl_output(log_probs, mask, 0.5 if share is None else share)
    return DPOTrainer._compute_loss(state, Says(output), batch, return_outputs=False)


def trl_dpo(pair, w, l, loss_types, beta, **options):
    """The same on a pair, with w and l as its log-probs."""
    tokens, mask = per_token(pair, w, l)
    reference = torch.tensor(pair[2:4], dtype=w.dtype)
    return trl_batch(tokens, mask, reference, loss_types, beta=beta, **options)
