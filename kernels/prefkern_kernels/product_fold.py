"""The product with the head and the fold over its logits, in one kernel that never writes a logit.

For token t with label y, over a part of the vocabulary (or all of it):

    z_v   = transform(h . W_v + b_v)
    m     = max_{v != y} z_v            total = sum_{v != y} exp(z_v - m)

and `label_logit = z_y`, with `label_slope` the softcap's derivative there. This is the state that
`fold` keeps; the kernel merges it into what the state held before. A forward without a gradient
needs no more, at 2NHV operations.

The steps:

    strip = one block of tokens x one split of the vocabulary, a program each
    tile of a strip: product in the accumulator -> transform -> the strip's running maximum and sum
    strips -> `(splits, n)` buffers of maxima and sums -> `_merge_splits_kernel` -> the state

Programs of one group of token blocks walk the same entries at about the same time. So a tile of the
weight is read from memory once a group, and the group's hidden states stay in the L2 cache.

A token's state is bitwise the same in every run, beside any other tokens: the split of the
vocabulary depends on the configuration, and not on the number of tokens or the device's load; the
merge takes the splits in order; nothing is atomic.

Products take operands as they are and accumulate in float32. float32 operands are multiplied as
float32, or as TF32 if torch's setting allows it. The configuration says how operands arrive: by
pointers, which every GPU has, or by tensor descriptors (TMA, from compute capability 9.0 on).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import autotune
from .launches import count
from .primitives import INTERPRET, check_rows, check_vectors, on_device_of, transform
from .tiles import (
    ProductClass,
    ProductConfig,
    VocabPart,
    allows_tf32,
    product_choice_of,
    product_class,
)

_INTERPRET = tl.constexpr(INTERPRET)
# A descriptor's base and the strides of its rows are multiples of this many bytes.
_DESCRIPTOR_ALIGNMENT = 16
_MERGE_TOKENS = 32
_MERGE_SPLITS = 32


@triton.jit
def _dot(a, b, accumulator, PRECISION: tl.constexpr):
    if _INTERPRET:
        # The interpreter multiplies the bit patterns of bf16.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def _cap(x, height, HAS_SOFTCAP: tl.constexpr):
    """height tanh(x) with a softcap, else x; -inf marks what is left out, and stays -inf.

    The accuracy is float32's relative to `height`, as a sum of exponentials needs it. The
    computation holds one value an element. `tanh_and_slope` is accurate at every x, but holds
    several values and spills registers here.
    """
    if HAS_SOFTCAP:
        t = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
        x = tl.where(x == -float("inf"), x, height * t)
    return x


@triton.jit
def _load_rows(
    operand,
    stride,
    first,
    rows,
    column,
    n_columns,
    BY_DESCRIPTOR: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A block of an operand's rows: by descriptor from `first` on, or by pointers at `rows`."""
    if BY_DESCRIPTOR:
        block = operand.load([first, column])
    else:
        columns = column + tl.arange(0, BLOCK_H)
        pointers = operand + rows[:, None] * stride + columns[None, :]
        if EVEN_H:
            block = tl.load(pointers)
        else:
            block = tl.load(pointers, mask=(columns < n_columns)[None, :], other=0.0)
    return block


@triton.jit(do_not_specialize=["n_tokens", "n_entries", "n_splits", "start"])
def _product_fold_kernel(
    hidden,
    stride_hn,
    weight,
    stride_wv,
    rows_ptr,
    labels_ptr,
    bias_ptr,
    maxima_ptr,
    totals_ptr,
    label_logit_ptr,
    label_slope_ptr,
    n_tokens,
    n_entries,
    n_columns,
    n_splits,
    start,
    logit_scale,
    softcap,
    temperature,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One strip: a block of tokens and one split of the entries."""
    # Token blocks vary fastest within a group, then splits, then groups.
    program = tl.program_id(0)
    n_blocks = tl.cdiv(n_tokens, BLOCK_N)
    group = program // (GROUP * n_splits)
    group_size = tl.minimum(n_blocks - group * GROUP, GROUP)
    within = program % (GROUP * n_splits)
    split = within // group_size
    first_token = (group * GROUP + within % group_size) * BLOCK_N

    tokens = first_token + tl.arange(0, BLOCK_N)
    is_token = tokens < n_tokens
    # Past the last token its row is read again, without a mask; the result is not stored.
    tokens = tl.minimum(tokens, n_tokens - 1).to(tl.int64)
    rows = tl.load(rows_ptr + tokens) if HAS_ROWS else tokens
    local = (tl.load(labels_ptr + tokens) - start).to(tl.int32)

    maximum = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    label = tl.zeros((BLOCK_N,), tl.float32)
    factor = logit_scale / (softcap if HAS_SOFTCAP else temperature)
    height = softcap / temperature
    first_tile = split * TILES
    last_tile = tl.minimum(first_tile + TILES, tl.cdiv(n_entries, BLOCK_V))
    for tile in tl.range(first_tile, last_tile, flatten=FLATTEN, warp_specialize=SPECIALIZE):
        first_entry = tile * BLOCK_V
        entries = first_entry + tl.arange(0, BLOCK_V)
        entry_rows = tl.minimum(entries, n_entries - 1).to(tl.int64)
        # Begin with the bias and add the products to it: it then takes no registers of its own.
        accumulator = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + entry_rows).to(tl.float32)
            if HAS_SOFTCAP:
                # An entry of bias -inf has a logit of minus the cap; -inf marks what is left out.
                bias = tl.where(bias == -float("inf"), -1e30, bias)
            accumulator += bias[None, :]
        for column in range(0, n_columns, BLOCK_H):
            h = _load_rows(
                hidden,
                stride_hn,
                first_token,
                rows,
                column,
                n_columns,
                BY_DESCRIPTOR,
                EVEN_H,
                BLOCK_H,
            )
            w = _load_rows(
                weight,
                stride_wv,
                first_entry,
                entry_rows,
                column,
                n_columns,
                BY_DESCRIPTOR,
                EVEN_H,
                BLOCK_H,
            )
            accumulator = _dot(h, w.T, accumulator, PRECISION)

        is_label = entries[None, :] == local[:, None]
        label += tl.sum(tl.where(is_label, accumulator, 0.0), axis=1)
        left_out = is_label if EVEN_V else is_label | (entries >= n_entries)[None, :]
        x = tl.where(left_out, -float("inf"), accumulator * factor)
        # A softcap keeps the order: the largest x gives the largest logit.
        new = tl.maximum(maximum, _cap(tl.max(x, axis=1), height, HAS_SOFTCAP))
        # If only the label's logit was seen, the maximum is -inf, and exp(-inf - 0) = 0.
        offset = tl.where(new == -float("inf"), 0.0, new)
        e = tl.exp(_cap(x, height, HAS_SOFTCAP) - offset[:, None])
        total = total * tl.exp(maximum - offset) + tl.sum(e, axis=1)
        maximum = new

    part = split.to(tl.int64) * n_tokens + tokens
    tl.store(maxima_ptr + part, maximum, mask=is_token)
    tl.store(totals_ptr + part, total, mask=is_token)
    # A label lies in one split: one program writes it.
    stop = tl.minimum(last_tile * BLOCK_V, n_entries)
    has_label = is_token & (local >= first_tile * BLOCK_V) & (local < stop)
    label_logit, label_slope = transform(label, logit_scale, softcap, temperature, HAS_SOFTCAP)
    tl.store(label_logit_ptr + tokens, label_logit, mask=has_label)
    if HAS_SOFTCAP:
        tl.store(label_slope_ptr + tokens, label_slope, mask=has_label)


@triton.jit(do_not_specialize=["n_tokens", "n_splits"])
def _merge_splits_kernel(
    maxima_ptr,
    totals_ptr,
    maximum_ptr,
    total_ptr,
    n_tokens,
    n_splits,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A block of tokens: merge their splits' maxima and sums, in order, into their state."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = tokens < n_tokens
    old = tl.load(maximum_ptr + tokens, mask=is_token, other=-float("inf"))
    highest = tl.full((BLOCK_S, BLOCK_N), -float("inf"), tl.float32)
    for block in range(0, n_splits, BLOCK_S):
        splits = block + tl.arange(0, BLOCK_S)
        mask = (splits < n_splits)[:, None] & is_token[None, :]
        part = splits.to(tl.int64)[:, None] * n_tokens + tokens[None, :]
        highest = tl.maximum(highest, tl.load(maxima_ptr + part, mask=mask, other=-float("inf")))
    new = tl.maximum(old, tl.max(highest, axis=0))
    offset = tl.where(new == -float("inf"), 0.0, new)
    sums = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for block in range(0, n_splits, BLOCK_S):
        splits = block + tl.arange(0, BLOCK_S)
        mask = (splits < n_splits)[:, None] & is_token[None, :]
        part = splits.to(tl.int64)[:, None] * n_tokens + tokens[None, :]
        maxima = tl.load(maxima_ptr + part, mask=mask, other=-float("inf"))
        sums += tl.load(totals_ptr + part, mask=mask, other=0.0) * tl.exp(maxima - offset[None, :])
    total = tl.load(total_ptr + tokens, mask=is_token, other=0.0) * tl.exp(old - offset)
    tl.store(maximum_ptr + tokens, new, mask=is_token)
    tl.store(total_ptr + tokens, total + tl.sum(sums, axis=0), mask=is_token)


def product_fold(
    hidden: torch.Tensor,  # (M, H)
    weight: torch.Tensor,  # (V, H), the entries from `start` on, in hidden's dtype
    bias: torch.Tensor | None,  # (V,)
    labels: torch.Tensor,  # (n,) int64, over the whole vocabulary
    maximum: torch.Tensor,  # (n,) float32, in and out, as are the next ones
    total: torch.Tensor,  # (n,)
    label_logit: torch.Tensor,  # (n,)
    label_slope: torch.Tensor,  # (n,)
    *,
    rows: torch.Tensor | None = None,  # (n,) int64, which rows of hidden; None: all, in order
    start: int = 0,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    config: ProductConfig | None = None,  # None: the device's own
) -> None:
    """Fold the logits of these entries into each token's running state.

    Two launches, or three if the vocabulary ends within a tile.

    Temporary memory: `product_fold_bytes`.
    """
    check_rows("hidden", hidden)
    check_rows("weight", weight)
    check_vectors(
        labels=labels,
        bias=bias,
        maximum=maximum,
        total=total,
        label_logit=label_logit,
        label_slope=label_slope,
        rows=rows,
    )
    n, (v, h) = labels.shape[0], weight.shape
    if hidden.shape[1] != h or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {list(hidden.shape)} in {hidden.dtype} does not meet "
            f"weight {list(weight.shape)} in {weight.dtype}"
        )
    if rows is None and hidden.shape[0] != n:
        raise ValueError(f"{n} labels for {hidden.shape[0]} rows of hidden")
    if n == 0 or v == 0:
        return
    product = product_class(hidden.dtype, allows_tf32(), h, plain=bias is None and softcap is None)
    if config is None:
        key = _tuning_key(hidden, weight, product)
        config = autotune.recall(key)
        if config is None and autotune.is_enabled():
            gathered = hidden if rows is None else hidden.index_select(0, rows)
            config = tune_product_fold(gathered, weight, bias, softcap=softcap)
        config = config or product_choice_of(hidden.device, product).candidates[0]
    if config.by_descriptor:
        if rows is not None:
            # A descriptor reads adjacent rows.
            hidden, rows = hidden.index_select(0, rows), None
        if not (fits_descriptor(hidden) and fits_descriptor(weight)):
            config = config._replace(by_descriptor=False)
    n_splits = config.splits(v)
    maxima = torch.empty((n_splits, n), dtype=torch.float32, device=hidden.device)
    totals = torch.empty_like(maxima)
    first_split = 0
    count("product_fold")
    with on_device_of(hidden):
        for part in config.parts(v):
            entries = slice(part.start, part.stop)
            _launch_strips(
                hidden,
                weight[entries],
                rows,
                labels,
                None if bias is None else bias[entries],
                maxima[first_split:],
                totals[first_split:],
                label_logit,
                label_slope,
                part,
                start=start + part.start,
                logit_scale=logit_scale,
                softcap=softcap,
                temperature=temperature,
                precision="tf32" if product.operands == "tf32" else "ieee",
            )
            first_split += part.splits
        _merge_splits_kernel[(triton.cdiv(n, _MERGE_TOKENS),)](
            maxima,
            totals,
            maximum,
            total,
            n,
            n_splits,
            BLOCK_N=_MERGE_TOKENS,
            BLOCK_S=_MERGE_SPLITS,
            num_warps=4,
        )


def _launch_strips(
    hidden: torch.Tensor,  # (M, H)
    weight: torch.Tensor,  # (v, H)
    rows: torch.Tensor | None,  # (n,)
    labels: torch.Tensor,  # (n,)
    bias: torch.Tensor | None,  # (v,)
    maxima: torch.Tensor,  # (splits or more, n)
    totals: torch.Tensor,  # (splits or more, n)
    label_logit: torch.Tensor,  # (n,)
    label_slope: torch.Tensor,  # (n,)
    part: VocabPart,
    *,
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    precision: str,
) -> None:
    """The strips of some entries; one launch."""
    n, (v, h), config = labels.shape[0], weight.shape, part.config
    operands: list[torch.Tensor | TensorDescriptor] = [hidden, weight]
    if config.by_descriptor:
        operands = [
            TensorDescriptor.from_tensor(x, [block, config.block_h])
            for x, block in ((hidden, config.block_n), (weight, config.block_v))
        ]
    _product_fold_kernel[(triton.cdiv(n, config.block_n) * part.splits,)](
        operands[0],
        hidden.stride(0),
        operands[1],
        weight.stride(0),
        rows,
        labels,
        bias,
        maxima,
        totals,
        label_logit,
        label_slope,
        n,
        v,
        h,
        part.splits,
        start,
        float(logit_scale),
        float(softcap or 1.0),
        float(temperature),
        HAS_ROWS=rows is not None,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        EVEN_V=v % config.block_v == 0,
        EVEN_H=h % config.block_h == 0,
        PRECISION=precision,
        BY_DESCRIPTOR=config.by_descriptor,
        FLATTEN=config.flatten,
        SPECIALIZE=config.specialize,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        TILES=config.tiles,
        GROUP=config.group,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def tune_product_fold(
    hidden: torch.Tensor,  # (n, H)
    weight: torch.Tensor,  # (V, H)
    bias: torch.Tensor | None = None,  # (V,)
    *,
    softcap: float | None = None,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> ProductConfig:
    """Time the device's candidates on these operands and store the fastest; see `autotune`."""
    n, h = hidden.shape
    product = product_class(hidden.dtype, allows_tf32(), h, plain=bias is None and softcap is None)
    labels = torch.zeros(n, dtype=torch.int64, device=hidden.device)
    state = [torch.zeros(n, dtype=torch.float32, device=hidden.device) for _ in range(4)]

    def run(config: ProductConfig) -> None:
        product_fold(
            hidden,
            weight,
            bias,
            labels,
            *state,
            logit_scale=1.0,
            softcap=softcap,
            temperature=1.0,
            config=config,
        )

    candidates = product_choice_of(hidden.device, product).candidates
    return autotune.tune(_tuning_key(hidden, weight, product), candidates, run, timer)


def _tuning_key(hidden: torch.Tensor, weight: torch.Tensor, product: ProductClass) -> autotune.Key:
    v, h = weight.shape
    return autotune.key_of(
        "product_fold", hidden.device, hidden.dtype, product.operands, h, v, product.plain
    )


def product_fold_bytes(
    tokens: int, vocab_size: int, hidden_bytes: int, config: ProductConfig
) -> int:
    """Temporary bytes of a call; `hidden_bytes` is a row's size if rows are gathered, else 0."""
    gathered = tokens * hidden_bytes if config.by_descriptor else 0
    return gathered + 2 * 4 * config.splits(vocab_size) * tokens


def product_fold_row(hidden: torch.Tensor, weight: torch.Tensor, plain: bool) -> int | None:
    """Bytes a token of a call if `product_fold` is faster on this device; None if not.

    The table of `tiles` says so for the devices that were measured. The environment variable
    PREFKERN_PRODUCT_FOLD, 1 or 0, decides for all devices.
    """
    choice = product_choice_of(
        hidden.device, product_class(hidden.dtype, allows_tf32(), weight.shape[1], plain)
    )
    wanted = os.environ.get("PREFKERN_PRODUCT_FOLD", "1" if choice.beats_library else "0")
    if wanted != "1" or weight.stride(1) != 1 or hidden.stride(-1) != 1:
        return None
    # Enough for any configuration: the states of its splits, and the gathered row.
    splits = max(config.splits(weight.shape[0]) for config in choice.candidates)
    return 2 * 4 * splits + hidden.shape[-1] * hidden.element_size()


def fits_descriptor(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can address x."""
    return (
        x.data_ptr() % _DESCRIPTOR_ALIGNMENT == 0
        and x.stride(0) * x.element_size() % _DESCRIPTOR_ALIGNMENT == 0
    )
