"""Packed batches: sequences end to end in one row, so that no padding is computed.

A row [1, M] of S sequences has bounds `cu_seqlens` [S + 1]: they say where each sequence begins.
With `prefixes` [S, 2] a sequence also sees earlier tokens of the row, so that a pair's prompt is
computed once (`prefkern.models.paths`). `packed_inputs` turns them into a model's inputs. There are
three ways to keep sequences apart:

    paths       each sequence attends to its prefix and itself alone, under sdpa
    positions   transformers' own: without an attention mask it builds one from positions that
                restart, and flash attention reads the bounds; there are no prefixes
    branches    attention over the whole row, with a mask by sequence and position, under sdpa and
                eager attention

No config says which of them a family allows. State space and linear attention layers carry their
state into the next sequence if their kernels are missing. ALiBi counts along the whole row. Some
models count positions inside, and GPT-OSS builds its masks without them. Such a model would still
train, but on sequences that read one another. So each model is probed once for each attention
implementation, and takes the first way that is right. Other tokens in the first sequence must not
change the hidden states of the next ones, and all hidden states must equal those of a padded batch.
If no way is right, packing is an error, never a wrong number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefkern.models import paths
from prefkern.models.calls import is_compiled, undisturbed
from prefkern.models.head_forward import forward_with_head, head_forward
from prefkern.models.heads import HeadInputs, find_head, unwrap
from prefkern.models.score_head import find_score_head, score_forward

Way = Literal["paths", "positions", "branches"]

# The lengths of the probe's sequences: a short one between two that are longer than a convolution's
# width and than a block of 64 or 128 tokens, which some layers work on.
_PROBE_LENGTHS = (67, 3, 130)
# Of the probe's pairs: prompt, chosen and rejected response.
_PROBE_PAIRS = ((40, 27, 31), (3, 1, 7), (1, 5, 4), (75, 55, 1))
# Chunks of attention must begin with each sequence, and windows count along a path. Real ones are
# far longer than the probe, so it shortens them to this.
_PROBE_REACH = 16
# What to say where `reads_whole_row`.
WHOLE_ROW = (
    "under padding_free this attention multiplies the whole row and masks what is of other "
    "sequences, the more the larger the batch: flash attention or "
    "attn_implementation='flex_attention' leaves that out"
)
_REACHES = (
    "attention_chunk_size",
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
)


def packed_inputs(
    model: nn.Module,
    input_ids: Tensor,  # (1, M)
    cu_seqlens: Tensor,  # (S + 1,)
    prefixes: Tensor | None = None,  # (S, 2)
) -> dict[str, Any]:
    """The inputs of a model's forward for a packed batch.

    Args:
        model: a Hugging Face causal LM or sequence classifier, bare or wrapped; it is probed at its
            first packed batch.
        input_ids: [1, M] int64.
        cu_seqlens: [S + 1] int32 or int64: where each sequence begins, and last M.
        prefixes: [S, 2] int32 or int64: start and length of the tokens of the row that a sequence
            also sees, all within one earlier sequence. Length 0: none. None: no sequence has one.

    Returns:
        Keywords for `prefkern.models.head_forward`, which takes the one of `prefkern.models.paths`
        out.

    Raises TypeError for bounds and prefixes that are not integer tensors, and ValueError for shapes
    and numbers that do not fit, and for a model in which sequences would read one another.
    """
    way = _way(model, shares=prefixes is not None)
    return _inputs(unwrap(model), input_ids, cu_seqlens, prefixes, way)


def require_packing(model: nn.Module, *, shares: bool = False) -> None:
    """Raise ValueError unless the model computes equal hidden states for packed and padded rows.

    `shares`: where sequences of a row have prefixes.
    """
    _way(model, shares)


def require_shared_router_loss(model: nn.Module) -> None:
    """Raise ValueError unless a model's load-balancing loss counts a shared prompt twice.

    That is what it counts in a padded batch, where each response has a prompt of its own.
    """
    base, _ = find_head(model)
    probe = _probe_row(base, shares=True)
    row = probe.packed(base, _way(model, shares=True), probe.ids)
    once = {**row, "attention_mask": torch.ones_like(row["input_ids"])}
    with undisturbed(model, probe.ids.device), _short_reaches(base):
        shared, counted_once, expected = (
            head_forward(model, {**inputs, "output_router_logits": True}, _keep_hidden)[1].aux_loss
            for inputs in (row, once, probe.padded)
        )
    # Routers choose by their own rounding, and shapes differ from a padded batch. But the first two
    # differ by the counts alone.
    is_near = (shared - expected).abs() <= 0.05 * expected.abs()
    if shared == counted_once or not is_near:
        raise ValueError(
            f"the load-balancing loss of {type(base).__name__} does not count a shared prompt for "
            f"each of its responses ({shared.item():.4g} instead of {expected.item():.4g}): leave "
            "out share_prompt, or train without this loss (router_aux_loss_coef=0)"
        )


def _keep_hidden(head: HeadInputs) -> tuple[Tensor, Tensor]:
    return head.hidden, head.hidden


def reads_whole_row(model: nn.Module, *, shares: bool = False) -> bool:
    """Whether the model computes attention between all tokens of a row and masks it afterwards."""
    is_masked = _implementation(unwrap(model)) in ("sdpa", "eager")
    return is_masked and _way(model, shares) != "paths"


def _way(model: nn.Module, shares: bool) -> Way:
    """The first way that is right for a model; raises ValueError if none is."""
    base = unwrap(model)
    if find_score_head(base) is None:
        find_head(model)
    # Checked at each call: the probe's result is kept for the base, with and without an adapter.
    if _adds_virtual_tokens(model):
        raise _refusal(
            base,
            "prompt learning puts its virtual tokens before the row, not before each sequence",
            shares,
        )
    implementation = _implementation(base)
    found = base.__dict__.setdefault("_prefkern_packs", {})
    # A compiled model would be compiled again for each batch's lengths.
    compiled = any(is_compiled(module) for module in model.modules())
    key = (implementation, shares, compiled)
    if key not in found:
        found[key] = _probed(model, base, implementation, shares, compiled)
    return found[key]


def _probed(model: nn.Module, base: Any, implementation: str, shares: bool, compiled: bool) -> Way:
    by_paths = implementation == paths.IMPLEMENTATION and not compiled
    ways: list[Way] = ["paths"] if by_paths else []
    if not shares:
        ways.append("positions")
    if implementation in (paths.IMPLEMENTATION, "eager"):
        ways.append("branches")
    problem = f"a shared prompt needs {paths.IMPLEMENTATION} or eager attention"
    for way in ways:
        found = _problem(model, base, way, shares)
        if found is None:
            return way
        # What transformers itself makes of the row says most.
        problem = found if way == "positions" or shares else problem
    raise _refusal(base, problem, shares)


def _inputs(
    base: Any, input_ids: Tensor, cu_seqlens: Tensor, prefixes: Tensor | None, way: Way
) -> dict[str, Any]:
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(
            f"with cu_seqlens input_ids must be one row [1, M], got shape {list(input_ids.shape)}"
        )
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {cu_seqlens!r}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must have shape [S + 1], got {list(cu_seqlens.shape)}")
    tokens, device = input_ids.shape[1], input_ids.device
    bounds = cu_seqlens.to(device, torch.int32)
    # transformers and the paths need lengths as Python ints.
    values = bounds.tolist()
    if min(b - a for a, b in pairwise(values)) < 1 or [values[0], values[-1]] != [0, tokens]:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, by at least 1 each; "
            f"got {cu_seqlens.tolist()}"
        )
    before = None if prefixes is None else _checked_prefixes(prefixes, values)
    sequences = paths.Paths.of(values, before, is_masked=way == "branches")

    positions = sequences.positions(device)
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": positions[None]}
    parameters = inspect.signature(base.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        # Some families read it from these only. With a cache, transformers builds no mask from
        # positions.
        inputs["use_cache"] = False
        if prefixes is None:
            longest = max(sequences.lengths)
            inputs |= {
                "cu_seq_lens_q": bounds,
                "cu_seq_lens_k": bounds,
                "max_length_q": longest,
                "max_length_k": longest,
                "seq_idx": sequences.numbers(device)[None],
            }
    if way != "positions":
        inputs[paths.KEYWORD] = sequences
    return inputs


def _checked_prefixes(prefixes: Tensor, bounds: list[int]) -> list[tuple[int, int]]:
    if not isinstance(prefixes, Tensor) or prefixes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"prefixes must be an int32 or int64 tensor, got {prefixes!r}")
    if list(prefixes.shape) != [len(bounds) - 1, 2]:
        raise ValueError(
            f"prefixes must have shape [{len(bounds) - 1}, 2] (a start and a length for each "
            f"sequence of cu_seqlens), got {list(prefixes.shape)}"
        )
    pairs = [(start, length) for start, length in prefixes.tolist()]
    for number, (start, length) in enumerate(pairs):
        own = bounds[number]
        if length < 0 or (length and not 0 <= start <= own - length):
            raise ValueError(
                f"prefixes[{number}] must lie before its sequence, which begins at {own}; got "
                f"start {start} and length {length}"
            )
        if length and any(start < bound < start + length for bound in bounds):
            raise ValueError(
                f"prefixes[{number}] must lie within one sequence, got start {start} and length "
                f"{length}, and cu_seqlens {bounds}"
            )
    return pairs


@dataclass(frozen=True)
class _ProbeRow:
    """A short packed row, the same row with another first sequence, and the sequences padded."""

    ids: Tensor  # (M,)
    changed: Tensor  # (M,), other tokens in the first sequence, after what others share of it
    bounds: Tensor  # (S + 1,)
    rows: Tensor  # (S, T), each with its prefix
    is_token: Tensor  # (S, T)
    is_own: Tensor  # (S, T), without the prefixes
    prefixes: Tensor | None  # (S, 2)

    def packed(self, base: Any, way: Way, ids: Tensor) -> dict[str, Any]:
        """The inputs of a packed row of these tokens."""
        return _inputs(base, ids[None], self.bounds, self.prefixes, way)

    @property
    def padded(self) -> dict[str, Any]:
        return {"input_ids": self.rows, "attention_mask": self.is_token.long()}


def _probe_row(base: Any, shares: bool) -> _ProbeRow:
    config, device = base.config.get_text_config(), base.get_input_embeddings().weight.device
    limit = getattr(config, "max_position_embeddings", None) or max(_PROBE_LENGTHS)
    lengths = [min(length, limit) for length in _PROBE_LENGTHS]
    prefixes, shared = [(0, 0)] * len(lengths), 0
    if shares:
        # As PreferenceCollator lays them out.
        pairs = [(min(p, limit // 2), min(c, limit // 2), r) for p, c, r in _PROBE_PAIRS]
        lengths = [p + c for p, c, _ in pairs] + [1 + min(r, limit - p) for p, _, r in pairs]
        starts = [0, *accumulate(lengths)][: len(pairs)]
        prefixes = [(0, 0)] * len(pairs)
        prefixes += [(start, p - 1) for start, (p, _, _) in zip(starts, pairs, strict=True)]
        shared = pairs[0][0]
    bounds = [0, *accumulate(lengths)]
    # Small ids, which no family reserves for images; each sequence gets different ones.
    vocab = min(config.vocab_size, 1000)
    ids = torch.arange(bounds[-1]) * 37 % vocab
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and pad >= 0:
        # A text may end with the pad token itself; without a mask the model must still read it.
        ids[torch.tensor(bounds[1:]) - 1] = pad
    first = slice(shared, lengths[0])
    changed = ids.clone()
    changed[first] = (ids[first] + 1) % vocab
    whole = [
        torch.cat([ids[start : start + prefix], ids[a:b]])
        for (start, prefix), (a, b) in zip(prefixes, pairwise(bounds), strict=True)
    ]
    rows = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
    places = torch.arange(rows.shape[1])
    is_token = places < torch.tensor([len(each) for each in whole])[:, None]
    is_own = is_token & (places >= torch.tensor([prefix for _, prefix in prefixes])[:, None])
    tree = torch.tensor(prefixes, dtype=torch.int32) if shares else None
    tensors = (ids, changed, torch.tensor(bounds), rows, is_token, is_own)
    return _ProbeRow(*(x.to(device) for x in tensors), prefixes=tree)


def _problem(model: nn.Module, base: Any, way: Way, shares: bool) -> str | None:
    """The reason why a model cannot take packed batches this way; None if it can."""
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "its forward takes no position_ids"
    config = base.config.get_text_config()
    if way != "positions" and _has_alibi(config):
        # A short row would pass: softmax does not see where a sequence begins. But in bf16 the bias
        # of a token far along the row is rounded by whole positions.
        return "ALiBi counts along the whole row"
    probe = _probe_row(base, shares)
    first = int(probe.bounds[1])
    with undisturbed(model, probe.ids.device), _short_reaches(base):
        padded, _ = _hidden(model, probe.padded)
        try:
            packed, precision = _hidden(model, probe.packed(base, way, probe.ids))
            beside_others, _ = _hidden(model, probe.packed(base, way, probe.changed))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            return f"its forward raised {type(error).__name__}: {error}".rstrip(".")
    # Shapes and kernels are the same. So the first sequence must not show in the others at any
    # precision, except by rounding where tokens choose experts.
    seen = _difference(beside_others[0, first:], packed[0, first:])
    if not seen <= max(4 * precision, 1e-4):
        return (
            "sequences in one row see one another: other tokens in the first one change the hidden "
            f"states of the next by {seen:.2g} of their norm"
        )
    # Shapes differ, and their rounding adds up over layers; wrong positions differ by far more.
    difference = _difference(packed[0], padded[probe.is_own])
    if not difference <= max(32 * precision, 1e-3):
        return (
            f"its hidden states in a packed row differ from those in a padded batch by "
            f"{difference:.2g} of their norm; a model that counts positions along the row does this"
        )
    return None


def _difference(x: Tensor, expected: Tensor) -> float:  # (N, H) each
    """The largest difference between two states of a token, relative to their norm."""
    norms = expected.norm(dim=-1)
    # The state of the pad token may be 0.
    return ((x - expected).norm(dim=-1) / norms.clamp(min=1e-3 * norms.max())).max().item()


def _hidden(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, float]:
    """The hidden states that reach the head, in float32, and the eps of the computation's dtype."""

    def keep(head: HeadInputs) -> tuple[tuple[Tensor, float], Tensor]:
        return _with_precision(head.hidden, head.weight.dtype), head.hidden

    base = unwrap(model)
    if find_score_head(base) is None:
        return forward_with_head(model, inputs, keep)[0]
    kept: list[tuple[Tensor, float]] = []

    def keep_states(hidden: Tensor, _: Any) -> Tensor:
        # A hook may have cast them for a float32 head.
        kept.append(_with_precision(hidden, base.dtype))
        return hidden[..., :1]

    score_forward(model, inputs, keep_states)
    return kept[0]


def _with_precision(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    kind = hidden.device.type
    dtypes = [hidden.dtype, dtype]
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    precision = max(torch.finfo(dtype).eps for dtype in dtypes)
    if torch.get_float32_matmul_precision() != "highest" and kind == "cuda":
        # TF32 keeps ten bits of the mantissa.
        precision = max(precision, 2.0**-10)
    return hidden.float(), precision


@contextmanager
def _short_reaches(base: Any) -> Iterator[None]:
    """Shorten chunks and windows of attention, so that the probe's sequences are longer."""
    owners = [base.config.get_text_config(), *base.modules()]
    owners += [module.config for module in base.modules() if hasattr(module, "config")]
    changed = []
    for owner in {id(owner): owner for owner in owners}.values():
        for name in _REACHES:
            value = vars(owner).get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > _PROBE_REACH:
                changed.append((owner, name, value))
                setattr(owner, name, _PROBE_REACH)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _has_alibi(config: Any) -> bool:
    kind = getattr(config, "position_embedding_type", None)
    flags = (getattr(config, name, False) for name in ("alibi", "use_alibi"))
    return any(flags) or "alibi" in str(kind).lower()


def _adds_virtual_tokens(model: Any) -> bool:
    while not hasattr(model, "peft_config") and isinstance(
        getattr(model, "module", None), nn.Module
    ):
        model = model.module
    configs = getattr(model, "peft_config", None) or {}
    return any(getattr(config, "is_prompt_learning", False) for config in configs.values())


def _implementation(base: Any) -> str:
    return str(getattr(base.config.get_text_config(), "_attn_implementation", None))


def _refusal(base: Any, problem: str, shares: bool) -> ValueError:
    what, out = "packed batches", "padding_free (cu_seqlens)"
    if shares:
        what, out = "rows that share a prompt", "share_prompt (prefixes)"
    return ValueError(
        f"{type(base).__name__} with attn_implementation={_implementation(base)!r} cannot take "
        f"{what}: {problem}. Leave out {out}, or load the model with another attn_implementation"
    )
