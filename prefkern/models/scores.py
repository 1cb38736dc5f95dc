"""Scores of packed sequences by a sequence classifier with one output, such as a reward model.

transformers' decoders return the logits of each row's last token that is not the pad token, and a
packed row has many. So the head is called on their states alone, and returns every sequence's score
at each position of the row: whichever position the model picks, it returns them all. They pass
through the model's wrappers (DDP, PEFT, FSDP) as its own logits do.

A model that pools states before its head, or scores another token, is recognised on short rows and
refused.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from prefkern.models.calls import undisturbed
from prefkern.models.heads import unwrap
from prefkern.models.packing import packed_inputs, require_packing
from prefkern.models.score_head import score_forward

_CHECKED = "_prefkern_scores_last_tokens"
_LENGTH = 8


def packed_scores(
    model: nn.Module,
    input_ids: Tensor,  # (1, M)
    cu_seqlens: Tensor,  # (S + 1,)
    prefixes: Tensor | None = None,  # (S, 2)
) -> Tensor:  # (S,)
    """The score of each sequence of a packed row.

    Args: as in `prefkern.models.packing.packed_inputs`; the model is a sequence classifier.

    Raises ValueError for a model that cannot score packed rows, and as `packed_inputs`.
    """
    require_packed_scores(model, shares=prefixes is not None)
    return _scores(model, input_ids, cu_seqlens, prefixes)


def require_packed_scores(model: nn.Module, *, shares: bool = False) -> None:
    """Raise ValueError unless a classifier scores packed and padded sequences alike.

    `shares`: where sequences of a row have prefixes.
    """
    require_packing(model, shares=shares)
    base = unwrap(model)
    pad = base.config.get_text_config().pad_token_id
    key = (pad, shares)
    if vars(base).get(_CHECKED) == key:
        return
    device = base.get_input_embeddings().weight.device
    usable = [token for token in range(2 * _LENGTH + 1) if token != pad][: 2 * _LENGTH]
    rows = torch.tensor(usable, device=device).view(2, _LENGTH)
    # The first row may end with the pad token: the model scores the one before it.
    rows[0, -1] = rows[0, -1] if pad is None else pad
    bounds = torch.tensor([0, _LENGTH, 2 * _LENGTH], device=device)
    with undisturbed(model, device):
        expected = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
        found = _scores(model, rows.view(1, -1), bounds, None)
    error = (found.float() - expected.float()).abs().max()
    if not error <= 0.05 * expected.abs().max():
        raise ValueError(
            f"{type(base).__name__} does not score the last token of a row, so packed rows cannot "
            "be scored: leave out padding_free (cu_seqlens)"
        )
    setattr(base, _CHECKED, key)


def _scores(
    model: nn.Module, input_ids: Tensor, cu_seqlens: Tensor, prefixes: Tensor | None
) -> Tensor:  # (S,)
    pad = unwrap(model).config.get_text_config().pad_token_id
    ends = _last_tokens(input_ids[0], cu_seqlens, prefixes, pad)

    def of_ends(hidden: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:  # (1, M, S)
        return score(hidden[:, ends]).transpose(1, 2).expand(-1, hidden.shape[1], -1)

    inputs = packed_inputs(model, input_ids, cu_seqlens, prefixes)
    return score_forward(model, inputs, of_ends).logits[0]


def _last_tokens(
    row: Tensor, cu_seqlens: Tensor, prefixes: Tensor | None, pad: int | None
) -> Tensor:  # (S,)
    """The place in the row of each path's last token that is not the pad token."""
    if pad is None:
        return cu_seqlens[1:].long() - 1
    places = torch.arange(len(row), device=row.device).masked_fill(row == pad, -1)
    bounds = [*pairwise(cu_seqlens.tolist())]
    before = [(start, 0) for start, _ in bounds] if prefixes is None else prefixes.tolist()
    found = []
    for (start, end), (first, length) in zip(bounds, before, strict=True):
        # transformers scores the first token of a row that holds nothing but the pad token.
        of_path = torch.cat([places[first : first + length], places[start:end]])
        found.append(of_path.max().clamp(min=first if length else start))
    return torch.stack(found)
