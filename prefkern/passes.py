"""The passes over tiles: from hidden states and the head to log-probs and gradients.

For token t with label y: `z_v = transform(h . W_v + b_v)`, `logp = z_y - logsumexp_v z_v`. Tiles of
raw products `(n, v)` are made in float32, folded into a state per token, and forgotten.

The state leaves the label's column out: with m the maximum over v != y met so far,
`total = sum_{v != y} exp(z_v - m)`. At the end, with M = max(m, z_y) and s the sum over all v
relative to M,

    logp    = -log1p(total exp(m - z_y))           where z_y >= m: exact for confident tokens
    1 - p_y = total exp(m - M) / s                 no cancellation
    D       = d logp / d h = c ((1 - p_y) t_y W_y - (exp(m - M) / s) A)
    A       = sum_{v != y} exp(z_v - m) t_v W_v

where `c t_v` is the derivative of the transform, t_v = 1 without a softcap. `forward` accumulates A
when asked (one pass, nothing recomputed); `backward` is the second of two passes, for a head that
trains: vocabulary outermost, so that each tile of dW is finished in float32 and rounded once.

Numerics: products of half-precision operands with a float32 result, whether by the GPU's own
(`out_dtype`) or by raising the operands of a tile; all sums in float32; nothing is accumulated by
atomics, so two runs are bitwise equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from prefkern.plan import Plan, Tiles


@dataclass(frozen=True)
class Transform:
    """What the model does to its raw logits: scale, tanh softcap, temperature, in this order."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """The constant part c of the transform's derivative."""
        return self.logit_scale / self.temperature

    def keywords(self) -> dict[str, float | None]:
        return {
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "temperature": self.temperature,
        }


@dataclass(frozen=True)
class Operands:
    """How a call's operands reach the products.

    `compute_dtype` is what a plain linear layer would multiply in (autocast's dtype under
    autocast); `upcasts` says that the device has no product of such operands with a float32 result,
    so that tiles of them are raised to float32 instead.
    """

    compute_dtype: torch.dtype
    upcasts: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.upcasts else self.compute_dtype

    def prepare(self, x: Tensor) -> Tensor:
        """Round to the compute dtype, as autocast would, then raise if need be."""
        return x.to(self.compute_dtype).to(self.dtype)


@dataclass(frozen=True)
class Head:
    """Hidden states and the head that they meet."""

    hidden: Tensor  # (M, H), all tokens
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    operands: Operands

    def rows(self, rows: Tensor | None, tokens: slice) -> Tensor:  # (n, H)
        return self.operands.prepare(take(self.hidden, rows, tokens))

    def words(self, words: slice) -> Tensor:  # (v, H)
        return self.operands.prepare(self.weight[words])

    def bias_of(self, words: slice) -> Tensor | None:  # (v,)
        return None if self.bias is None else self.bias[words]


class FoldState:
    """What a token needs of its logits: maximum, sum, label's logit; (N,) float32 each.

    It is a value of its own: states of two parts of the vocabulary can be combined, whichever
    kernels, tiles or ranks they came from.
    """

    def __init__(self, tokens: int, device: torch.device, with_stats: bool) -> None:
        def filled(value: float) -> Tensor:
            return torch.full((tokens,), value, dtype=torch.float32, device=device)

        self.maximum = filled(-math.inf)  # m, over v != y
        self.total = filled(0.0)  # sum_{v != y} exp(z_v - m)
        self.label_logit = filled(-math.inf)  # z_y
        self.label_slope = filled(1.0)  # t_y
        self.shifted = filled(0.0) if with_stats else None  # sum_{v != y} exp(z_v - m) (z_v - m)
        self.logit_sum = filled(0.0) if with_stats else None  # sum_v z_v
        self.before = filled(-math.inf) if with_stats else None  # max_{v < y} z_v
        self.squares = filled(0.0) if with_stats else None  # sum_{v != y} exp(2 (z_v - m))

    def __getitem__(self, tokens: slice) -> FoldState:
        """The state of some tokens, a view."""
        part = object.__new__(FoldState)
        for name, value in vars(self).items():
            setattr(part, name, None if value is None else value[tokens])
        return part


@dataclass(frozen=True)
class Folded:
    """The end of a fold: (N,) float32 each."""

    logps: Tensor
    maximum: Tensor  # M, over all v
    total: Tensor  # s = sum_v exp(z_v - M)
    rest: Tensor  # exp(m - M) / s: what turns `A` into a mean under the distribution
    miss: Tensor  # 1 - p_y
    hit: Tensor  # p_y
    log_total: Tensor  # log s


def finish(state: FoldState) -> Folded:
    """Combine the label's own logit with the fold over the others."""
    m, label = state.maximum, state.label_logit
    confident = label >= m
    top = torch.maximum(m, label)
    # exp(-inf) where there is no other word than the label; total is then 0.
    drop = torch.exp(m - top)
    own = torch.exp(label - top)
    total = state.total * drop + own
    log_total = torch.where(confident, torch.log1p(state.total * drop), torch.log(total))
    logps = torch.where(confident, -log_total, (label - top) - log_total)
    miss = state.total * drop / total
    return Folded(logps, top, total, drop / total, miss, own / total, log_total)


def statistics(
    state: FoldState, folded: Folded, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy, mean logit, is_top1 and log sum_v p_v^2, (N,) each, of a fold with statistics."""
    assert state.shifted is not None and state.logit_sum is not None
    assert state.before is not None and state.squares is not None
    # entropy = log s - sum_v p_v (z_v - M), in terms that are all small for a confident token.
    drop = torch.exp(state.maximum - folded.maximum)
    moved = torch.where(
        state.total > 0, (state.maximum - folded.maximum) * state.total, torch.zeros_like(drop)
    )
    below = state.label_logit - folded.maximum
    own = torch.where(below > -math.inf, torch.exp(below) * below, torch.zeros_like(drop))
    spread = (state.shifted + moved) * drop + own
    entropy = torch.log(folded.total) - spread / folded.total
    # A tie with an earlier word is not a top-1 prediction, as argmax takes the first maximum.
    is_top1 = (state.label_logit >= state.maximum) & (state.label_logit > state.before)
    # sum_v p_v^2 = (1 + others) / s^2, where the 1 is the label's own term if it is the largest:
    # both logarithms are then small numbers, formed of small numbers, for a confident token.
    others = state.squares * drop * drop
    collision = torch.where(
        state.label_logit >= state.maximum,
        torch.log1p(others) - 2 * torch.log1p(state.total * drop),
        torch.log(others + torch.exp(2 * below)) - 2 * torch.log(folded.total),
    )
    # A probability's logarithm, which rounding may carry above 0.
    return entropy, state.logit_sum / vocab_size, is_top1, collision.clamp(max=0.0)


def forward(
    hidden: Tensor,  # (M, H), all tokens
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,) which of the M tokens are scored; None: all
    labels: Tensor,  # (N,)
    transform: Transform,
    operands: Operands,
    plan: Plan,
    ops: ModuleType,
    with_stats: bool,
) -> tuple[FoldState, Folded, Tensor | None]:
    """Fold all tiles; with plan.structure "one_pass" also `D`, (N, H) float32."""
    N, H = labels.shape[0], hidden.shape[1]
    device = hidden.device
    one_pass = plan.structure == "one_pass"
    state = FoldState(N, device, with_stats)
    derivative = torch.empty((N, H), dtype=torch.float32, device=device) if one_pass else None
    buffers = Buffers(plan.forward_tiles, operands, device, one_pass)

    for tokens in slices(N, plan.forward_tiles.token_tile):
        part = state[tokens]
        h = operands.prepare(take(hidden, rows, tokens))
        accumulator = derivative[tokens] if derivative is not None else None
        rescale = torch.empty_like(part.maximum) if one_pass else None
        for words in slices(weight.shape[0], plan.forward_tiles.vocab_tile):
            w = operands.prepare(weight[words])
            tile, weights = buffers.views(h.shape[0], w.shape[0])
            product(h, w.t(), tile)
            ops.fold(
                tile,
                labels[tokens],
                None if bias is None else bias[words],
                part.maximum,
                part.total,
                part.label_logit,
                part.label_slope,
                rescale,
                weights,
                part.shifted,
                part.logit_sum,
                part.before,
                part.squares,
                start=words.start,
                **transform.keywords(),
            )
            if accumulator is not None:
                assert rescale is not None and weights is not None
                if words.start == 0:
                    product(weights, w, accumulator)
                else:
                    ops.rescale_rows(accumulator, rescale)
                    add_product(weights, w, accumulator)
            # A tile's copy of the weight must be gone before the next one is made.
            del w
        del h
        if accumulator is not None:
            folded = finish(part)
            # D = c ((1 - p_y) t_y W_y - rest A)
            accumulator.mul_((-transform.factor * folded.rest).unsqueeze(1))
            label_rows = weight.index_select(0, labels[tokens]).to(operands.compute_dtype)
            share = (transform.factor * folded.miss * part.label_slope).unsqueeze(1)
            accumulator.addcmul_(label_rows.float(), share)
            del label_rows
    return state, finish(state), derivative


def backward(
    grad: Tensor,  # (N,) d loss / d logp, float32
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
    maximum: Tensor,  # (N,) M
    total: Tensor,  # (N,) s
    miss: Tensor,  # (N,) 1 - p_y
    transform: Transform,
    operands: Operands,
    plan: Plan,
    ops: ModuleType,
    needs: tuple[bool, bool, bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (M, H), weight (V, H) and bias (V,), in their dtypes."""
    assert plan.backward_tiles is not None
    coefficient = -grad / total
    label_gradient = grad * miss

    def of_words(words: slice) -> TileGradient:
        def of_tokens(tokens: slice, tile: Tensor, dlogits: Tensor) -> None:
            ops.logits_gradient(
                tile,
                labels[tokens],
                None if bias is None else bias[words],
                maximum[tokens],
                coefficient[tokens],
                label_gradient[tokens],
                dlogits,
                start=words.start,
                **transform.keywords(),
            )

        return of_tokens

    head = Head(hidden, weight, bias, operands)
    return second_pass(head, rows, labels.shape[0], plan.backward_tiles, needs, of_words)


# Turns the raw products of some tokens, (n, v), into the loss's gradient with respect to them.
TileGradient = Callable[[slice, Tensor, Tensor], None]


def second_pass(
    head: Head,
    rows: Tensor | None,  # (N,)
    count: int,  # N
    tiles: Tiles,
    needs: tuple[bool, bool, bool],  # gradients of hidden, weight, bias
    of_words: Callable[[slice], TileGradient],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Recompute each tile, turn it into its gradient, and take the products with that.

    `of_words(words)` is asked once for each tile of the vocabulary, and what it returns holds all
    that belongs to those words.
    """
    H = head.hidden.shape[1]
    device = head.hidden.device
    needs_hidden, needs_weight, needs_bias = needs
    dhidden = torch.zeros((count, H), dtype=torch.float32, device=device) if needs_hidden else None
    dweight = torch.empty_like(head.weight) if needs_weight else None
    dbias = torch.empty_like(head.bias) if needs_bias and head.bias is not None else None
    buffers = Buffers(tiles, head.operands, device, True)
    dweight_buffer = None
    if needs_weight:
        dweight_buffer = torch.empty((tiles.vocab_tile, H), dtype=torch.float32, device=device)

    for words in slices(head.weight.shape[0], tiles.vocab_tile):
        w = head.words(words)
        of_tokens = of_words(words)
        size = w.shape[0]
        dweight_tile = None if dweight_buffer is None else dweight_buffer[:size].zero_()
        dbias_tile = torch.zeros(size, dtype=torch.float32, device=device) if needs_bias else None
        for tokens in slices(count, tiles.token_tile):
            h = head.rows(rows, tokens)
            tile, dlogits = buffers.views(h.shape[0], size)
            assert dlogits is not None
            product(h, w.t(), tile)
            of_tokens(tokens, tile, dlogits)
            # dW_v = sum_t dz_tv h_t,  dh_t = sum_v dz_tv W_v,  db_v = sum_t dz_tv
            if dweight_tile is not None:
                add_product(dlogits.t(), h, dweight_tile)
            if dhidden is not None:
                add_product(dlogits, w, dhidden[tokens])
            if dbias_tile is not None:
                dbias_tile += dlogits.sum(0, dtype=torch.float32)
            del h
        if dweight is not None and dweight_tile is not None:
            dweight[words] = dweight_tile
        if dbias is not None and dbias_tile is not None:
            dbias[words] = dbias_tile
        # A tile's copies of weights must be gone before the next ones are made.
        del w, of_tokens
    if dhidden is not None:
        shape, dtype = head.hidden.shape, head.hidden.dtype
        dhidden = scatter_rows([(dhidden, None)], rows, shape, dtype, tiles.token_tile)
    return dhidden, dweight, dbias


def scatter_rows(
    terms: Sequence[tuple[Tensor, Tensor | None]],  # (N, H) and what scales it, (N,), float32
    rows: Tensor | None,  # (N,)
    shape: torch.Size,  # (M, H)
    dtype: torch.dtype,
    token_tile: int,
) -> Tensor:  # (M, H)
    """The sum of the terms, rounded once, at the rows' places; 0 where not scored."""
    (first, first_scale), *others = terms
    make = torch.empty if rows is None else torch.zeros
    out = make(shape, dtype=dtype, device=first.device)
    for tokens in slices(first.shape[0], token_tile):
        part = first[tokens]
        if first_scale is not None:
            part = part * first_scale[tokens].unsqueeze(1)
        for values, scale in others:
            assert scale is not None
            part = part.addcmul(values[tokens], scale[tokens].unsqueeze(1))
        if rows is None:
            out[tokens] = part
        else:
            out.index_copy_(0, rows[tokens], part.to(out.dtype))
    return out


class Buffers:
    """One float32 tile, and the tile that the second product reads: the same where it can be."""

    def __init__(
        self,
        tiles: Tiles,
        operands: Operands,
        device: torch.device,
        second_product: bool,
    ) -> None:
        size = tiles.token_tile * tiles.vocab_tile
        self.tile = torch.empty(size, dtype=torch.float32, device=device)
        self.second = None
        if second_product:
            self.second = (
                self.tile
                if operands.dtype == torch.float32
                else torch.empty(size, dtype=operands.dtype, device=device)
            )

    def views(self, n: int, v: int) -> tuple[Tensor, Tensor | None]:
        tile = self.tile[: n * v].view(n, v)
        if self.second is None or self.second is self.tile:
            return tile, None if self.second is None else tile
        return tile, self.second[: n * v].view(n, v)


def take(hidden: Tensor, rows: Tensor | None, tokens: slice) -> Tensor:
    return hidden[tokens] if rows is None else hidden.index_select(0, rows[tokens])


def slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b` in float32, without rounding to the operands' dtype on the way."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out += a @ b` in float32."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
