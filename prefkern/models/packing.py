"""Packed batches: sequences end to end in one row, so that no padding is computed.

A row [1, M] of S sequences has bounds `cu_seqlens` [S + 1]: they say where each sequence begins.
`packed_inputs` turns them into every input that some model family reads. Positions restart with
each sequence; without an attention mask, transformers builds a block-diagonal mask from them for
sdpa, eager and flex attention. The bounds go to flash attention's variable-length path. The number
of each token's sequence goes to state space layers whose kernels support it.

No config says whether a family uses these inputs. State space and linear attention layers carry
their state into the next sequence if their kernels are missing. ALiBi counts along the whole row.
Some models count positions inside, and GPT-OSS builds its masks without them. Such a model would
still train, but on sequences that read one another. So each model is probed once for each attention
implementation. Other tokens in the first sequence must not change the hidden states of the next
one, and all hidden states must equal those of a padded batch. Otherwise packing is an error, never
a wrong number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefkern.models import paths
from prefkern.models.calls import is_compiled, undisturbed
from prefkern.models.head_forward import forward_with_head
from prefkern.models.heads import HeadInputs, find_head, unwrap

# The lengths of the probe's sequences: a short one between two that are longer than a convolution's
# width and than a block of 64 or 128 tokens, which some layers work on.
_PROBE_LENGTHS = (67, 3, 130)
# The chunks of chunked attention must begin with each sequence. Real chunks are far longer than the
# probe, so it shortens them to this.
_PROBE_CHUNK = 16


def packed_inputs(
    model: nn.Module,
    input_ids: Tensor,  # (1, M)
    cu_seqlens: Tensor,  # (S + 1,)
) -> dict[str, Any]:
    """The inputs of a causal LM's forward for a packed batch.

    Args:
        model: a Hugging Face causal LM, bare or wrapped; it is probed at its first packed batch.
        input_ids: [1, M] int64.
        cu_seqlens: [S + 1] int32 or int64: where each sequence begins, and last M.

    Raises TypeError for a cu_seqlens that is not an integer tensor, and ValueError for shapes and
    bounds that do not fit, and for a model in which packed sequences would read one another.
    """
    require_packing(model)
    return _inputs(unwrap(model), input_ids, cu_seqlens, _goes_by_paths(model))


def require_packing(model: nn.Module) -> None:
    """Raise ValueError unless the model computes equal hidden states for packed and padded rows.

    Also finds out whether it does so with attention along paths (`prefkern.models.paths`).
    """
    base, _ = find_head(model)
    # Checked at each call: the probe's result is kept for the base, with and without an adapter.
    if _adds_virtual_tokens(model):
        raise _refusal(
            base, "prompt learning puts its virtual tokens before the row, not before each sequence"
        )
    implementation = _implementation(base)
    if _packs(base) is not None:
        return
    by_paths = implementation == paths.IMPLEMENTATION
    if by_paths and _problem(model, base, by_paths) is not None:
        by_paths = False
    problem = None if by_paths else _problem(model, base, by_paths)
    if problem is not None:
        raise _refusal(base, problem)
    base.__dict__["_prefkern_packs"] = (implementation, by_paths)


def reads_whole_row(model: nn.Module) -> bool:
    """Whether the model computes attention between all tokens of a row and masks it afterwards.

    Call it after `require_packing`.
    """
    is_masked = _implementation(unwrap(model)) in ("sdpa", "eager")
    return is_masked and not _goes_by_paths(model)


def _packs(base: Any) -> tuple[str, bool] | None:
    """What the probe found with this attention: (implementation, by paths); None: not probed."""
    found = base.__dict__.get("_prefkern_packs")
    return found if found is not None and found[0] == _implementation(base) else None


def _goes_by_paths(model: nn.Module) -> bool:
    found = _packs(unwrap(model))
    if found is None or not found[1]:
        return False
    # A compiled model would be compiled again for each batch's lengths.
    return not any(is_compiled(module) for module in model.modules())


def _inputs(base: Any, input_ids: Tensor, cu_seqlens: Tensor, by_paths: bool) -> dict[str, Any]:
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
    lengths = bounds.diff()
    # The only synchronisation: transformers and the paths need lengths as Python ints.
    values = bounds.tolist()
    sequences = paths.Paths.of(values)
    if min(sequences.lengths) < 1 or [values[0], values[-1]] != [0, tokens]:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, by at least 1 each; "
            f"got {cu_seqlens.tolist()}"
        )
    longest = max(sequences.lengths)

    def of_tokens(values: Tensor) -> Tensor:  # (S,) -> (M,)
        return values.repeat_interleave(lengths, output_size=tokens)

    positions = torch.arange(tokens, device=device) - of_tokens(bounds[:-1])
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": positions[None]}
    parameters = inspect.signature(base.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        numbers = torch.arange(len(lengths), dtype=torch.int32, device=device)
        inputs |= {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": of_tokens(numbers)[None],
            # Some families read it from these only. With a cache, transformers builds no mask from
            # positions.
            "use_cache": False,
        }
    if by_paths:
        inputs[paths.KEYWORD] = sequences
    return inputs


def _problem(model: nn.Module, base: Any, by_paths: bool) -> str | None:
    """The reason why a model cannot take packed batches; None if it can."""
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "its forward takes no position_ids"
    config = base.config.get_text_config()
    device = base.get_input_embeddings().weight.device
    limit = getattr(config, "max_position_embeddings", None) or max(_PROBE_LENGTHS)
    lengths = torch.tensor([min(length, limit) for length in _PROBE_LENGTHS])
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(device)
    first = int(lengths[0])
    # Small ids, which no family reserves for images; each sequence gets different ones.
    vocab = min(config.vocab_size, 1000)
    ids = torch.arange(int(lengths.sum())) * 37 % vocab
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and pad >= 0:
        # A text may end with the pad token itself; without a mask the model must still read it.
        ids[lengths.cumsum(0) - 1] = pad
    changed = torch.cat([(ids[:first] + 1) % vocab, ids[first:]])
    is_token = torch.arange(int(lengths.max())) < lengths[:, None]
    rows = torch.zeros(is_token.shape, dtype=torch.int64)
    rows[is_token] = ids
    ids, changed, rows, is_token = (x.to(device) for x in (ids, changed, rows, is_token))

    with undisturbed(model, device), _small_chunks(config):
        padded, _ = _hidden(model, {"input_ids": rows, "attention_mask": is_token.long()})
        try:
            packed, precision = _hidden(model, _inputs(base, ids[None], bounds, by_paths))
            beside_others, _ = _hidden(model, _inputs(base, changed[None], bounds, by_paths))
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
    difference = _difference(packed[0], padded[is_token])
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
        hidden, kind = head.hidden, head.hidden.device.type
        dtypes = [hidden.dtype, head.weight.dtype]
        if torch.is_autocast_enabled(kind):
            dtypes.append(torch.get_autocast_dtype(kind))
        precision = max(torch.finfo(dtype).eps for dtype in dtypes)
        if torch.get_float32_matmul_precision() != "highest" and kind == "cuda":
            # TF32 keeps ten bits of the mantissa.
            precision = max(precision, 2.0**-10)
        return (hidden.float(), precision), hidden

    return forward_with_head(model, inputs, keep)[0]


@contextmanager
def _small_chunks(config: Any) -> Iterator[None]:
    """Shorten the chunks of chunked attention, so that the probe spans several of them."""
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None:
        config.attention_chunk_size = _PROBE_CHUNK
    try:
        yield
    finally:
        if chunk is not None:
            config.attention_chunk_size = chunk


def _adds_virtual_tokens(model: Any) -> bool:
    while not hasattr(model, "peft_config") and isinstance(
        getattr(model, "module", None), nn.Module
    ):
        model = model.module
    configs = getattr(model, "peft_config", None) or {}
    return any(getattr(config, "is_prompt_learning", False) for config in configs.values())


def _implementation(base: Any) -> str:
    return str(getattr(base.config.get_text_config(), "_attn_implementation", None))


def _refusal(base: Any, problem: str) -> ValueError:
    return ValueError(
        f"{type(base).__name__} with attn_implementation={_implementation(base)!r} cannot take "
        f"packed batches: {problem}. Leave out padding_free (cu_seqlens), or load the model with "
        "another attn_implementation"
    )
