"""Break the source on purpose, a line at a time, and see that the tests notice.

usage: python tests/mutations.py [--workers N] [--only TEXT | --new]     (make mutate)

Each of `MUTATIONS` is applied to a copy of the tree in a temporary folder. There the tests named
with it run, without long ones, until one fails; that test must pass without the mutation. The
script writes `bench/results/mutations.json` and the page `bench/MUTATIONS.md`, except with
`--only`. `--new` runs only mutations that the record does not have as killed. The exit status is 1
unless every mutation is killed. A mutation that survives shows what no test looks at; write that
test.

`tests/system/test_mutations.py` compares the list with the source at every run of the tests: each
text is found exactly once, and its replacement is Python.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench/results/mutations.json"
PAGE = ROOT / "bench/MUTATIONS.md"
SECONDS = 300
# What tests read beside the packages.
COPIED = ("prefkern", "kernels", "tests", "bench", "examples")
# As pytest has it (pyproject.toml).
PATH = (".", "kernels", "bench", "tests")
HEAD = """\
# Mutations

Written by `make mutate`, last on {date}: {killed} of {tried} killed. Each line changes one thing in a copy
of the source and runs the tests of `make test` that should notice, and no long ones. *Killed by* is the
first that failed, which passes without the change.

| what breaks | file | killed by | s |
|---|---|---|---|
"""


class Mutation(NamedTuple):
    """One change: `old`, which is in the file once, becomes `new`."""

    breaks: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest

    def applied(self, root: Path) -> str:
        """The file's text with the change. Raises LookupError unless `old` is in it once."""
        text = (root / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise LookupError(f"{self.file} has {self.old!r} {count} times")
        return text.replace(self.old, self.new)


@dataclass
class Outcome:
    """How a mutation ended: killed, survived, timeout, not found, or not run."""

    breaks: str
    file: str
    old: str
    new: str
    tests: str
    status: str
    killed_by: str = ""
    seconds: float = 0.0
    date: str = ""


PASSES = "prefkern/ops/passes.py"
BACKWARD = "prefkern/ops/backward.py"
TORCH = "prefkern/ops/torch_tiles.py"
SHARDS = "prefkern/ops/shards.py"
CONTEXT_PARALLEL = "prefkern/training/context_parallel.py"
TENSOR_PARALLEL = "prefkern/training/tensor_parallel.py"
KERNELS = "kernels/prefkern_kernels"

MUTATIONS = (
    # The passes and their tiles.
    Mutation(
        "sign of the head's gradient",
        BACKWARD,
        "policy = gathered.share * (dlogps * -factor)",
        "policy = gathered.share * (dlogps * factor)",
        "tests/ops/test_kept.py -k hidden_may_be_frozen",
    ),
    Mutation(
        "kept tokens' part of dW lacks the loss's gradient",
        BACKWARD,
        "h = (own * r.unsqueeze(1)).to(dtype)",
        "h = own.to(dtype)",
        "tests/ops/test_kept.py -k hidden_may_be_frozen",
    ),
    Mutation(
        "bias gradient is of the last tile of tokens",
        BACKWARD,
        "dbias_tile += weights.sum(0, dtype=wide)",
        "dbias_tile = weights.sum(0, dtype=wide)",
        "tests/ops/test_kept.py -k float32_against_float64",
    ),
    Mutation(
        "dW of one tile of tokens",
        BACKWARD,
        "add = product if tokens.start == 0 else add_product\n                add(weights.t()",
        "add = product\n                add(weights.t()",
        "tests/ops/test_kept.py -k hidden_may_be_frozen",
    ),
    Mutation(
        "D is accumulated in half precision",
        PASSES,
        "add(weights[:, part], w[part], self.accumulator)",
        "add(weights[:, part], w[part], self.accumulator)\n"
        "            self.accumulator.copy_(self.accumulator.half())",
        "tests/ops/test_linear_logprobs.py -k half_precision_gradients",
    ),
    Mutation(
        "dW is accumulated in half precision",
        BACKWARD,
        "add(weights.t(), h, tile_of_weights)",
        "add(weights.t(), h, tile_of_weights)\n"
        "                tile_of_weights.copy_(tile_of_weights.half())",
        "tests/ops/test_linear_logprobs.py -k half_precision_gradients",
    ),
    Mutation(
        "float16's gradients are not scaled",
        BACKWARD,
        "scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)",
        "scale = torch.ones_like(largest)",
        "tests/ops/test_kept.py -k tiny",
    ),
    Mutation(
        "a reference through the same head gets the policy's log-probs",
        PASSES,
        "_finish(ref, head, y, ref_logps[tokens], numbers, plan, transform, ops, is_shard)",
        "ref_logps[tokens] = logps[tokens]",
        "tests/loss/test_loss.py -k shared_head",
    ),
    Mutation(
        "the label's column at a tile's end",
        TORCH,
        "inside = (local >= 0) & (local < tile.shape[1])",
        "inside = (local >= 0) & (local <= tile.shape[1])",
        "tests/ops/test_tile_edges.py",
    ),
    Mutation(
        "the label is not left out of the sum",
        TORCH,
        "z.scatter_(1, column, torch.where(inside.unsqueeze(1), -math.inf, picked))",
        "z.scatter_(1, column, picked)",
        "tests/ops/test_linear_logprobs.py -k float32_against_float64",
    ),
    Mutation(
        "the accumulator is not rescaled",
        TORCH,
        "accumulator.mul_(factor.unsqueeze(1))",
        "accumulator.mul_(torch.ones_like(factor).unsqueeze(1))",
        "tests/ops/test_linear_logprobs.py -k float32_against_float64",
    ),
    Mutation(
        "kept tiles are not brought to one unit",
        TORCH,
        "factors = torch.exp(maxima - unit)",
        "factors = torch.exp(maxima - maxima)",
        "tests/ops/test_kept.py -k 'float32_against_float64 and torch'",
    ),
    Mutation(
        "softcap's derivative",
        TORCH,
        "torch.addcmul(tile.new_ones(()), tile, tile, value=-1)",
        "torch.addcmul(tile.new_ones(()), tile, tile, value=-0.5)",
        "tests/ops/test_linear_logprobs.py -k float32_against_float64",
    ),
    Mutation(
        "a confident token's log-prob loses its digits",
        "prefkern/ops/fold_state.py",
        "torch.where(confident, torch.log1p(state.total * drop), torch.log(total))",
        "torch.log(total)",
        "tests/ops/test_linear_logprobs.py -k confident_token",
    ),
    Mutation(
        "sign in the entropy",
        "prefkern/ops/fold_state.py",
        "entropy = torch.log(folded.total) - spread / folded.total",
        "entropy = torch.log(folded.total) + spread / folded.total",
        "tests/ops/test_linear_logprobs.py -k test_statistics",
    ),
    # The kernels, under the interpreter.
    Mutation(
        "softcap's derivative in the kernels",
        f"{KERNELS}/primitives.py",
        "return t, 4.0 * e * r * r",
        "return t, 4.0 * e * r",
        "tests/kernels/test_kernels.py -k softcap_near_0",
    ),
    Mutation(
        "a fold's maximum sees what lies beyond the tile",
        f"{KERNELS}/fold.py",
        'return tl.where(mask & ~left_out, z, -float("inf"))',
        'return tl.where(~left_out, z, -float("inf"))',
        "tests/ops/test_linear_logprobs.py -k all_logits_far_below_zero",
    ),
    Mutation(
        "a token's first tile leaves its label's old logit",
        f"{KERNELS}/fold.py",
        "is_stored = is_here | (first != 0)",
        "is_stored = is_here",
        "tests/kernels/test_kernels.py -k test_fold",
    ),
    Mutation(
        "a row that a fold holds is folded beside its label",
        f"{KERNELS}/fold.py",
        "others = _without(offs_v == local, z, mask)",
        "others = tl.where(mask, z, -float('inf'))",
        "tests/kernels/test_kernels.py -k test_fold",
    ),
    Mutation(
        "tiles are wider than a fold holds",
        "prefkern/ops/plan.py",
        "return FOLD_ENTRIES",
        "return self._most_entries(tokens)",
        "tests/ops/test_plan.py -k reads_its_rows_once",
    ),
    Mutation(
        "a trained head's default workspace is a frozen one's",
        "prefkern/ops/workspace.py",
        "share = _SHARE_OF_GPU_TRAINED if trains_head else _SHARE_OF_GPU",
        "share = _SHARE_OF_GPU",
        "tests/ops/test_plan.py -k default_has_room",
    ),
    Mutation(
        "a tile of dW is the whole vocabulary",
        "prefkern/ops/plan.py",
        'return min(entries, _MOST_OF_A_GRADIENT) if self.backend == "triton" else entries',
        "return entries",
        "tests/ops/test_plan.py -k no_float32_copy",
    ),
    Mutation(
        "a fold's sum sees what lies beyond the tile",
        f"{KERNELS}/fold.py",
        "counts = mask & (entries != local)",
        "counts = entries != local",
        "tests/kernels/test_kernels.py -k test_fold",
    ),
    Mutation(
        "sign in the end of a fold",
        f"{KERNELS}/finish.py",
        "of_rest = -factor * rest",
        "of_rest = factor * rest",
        "tests/kernels/test_kernels.py -k test_finish",
    ),
    Mutation(
        "sums beyond float16",
        f"{KERNELS}/finish.py",
        "tl.store(share_ptr + row, rest * tl.exp(excess))",
        "tl.store(share_ptr + row, rest)",
        "tests/kernels/test_kernels.py -k test_finish",
    ),
    Mutation(
        "the label's column of recomputed weights",
        f"{KERNELS}/remake_weights.py",
        "value = tl.where(entries == local, label_gradient, value * slope)",
        "value = value * slope",
        "tests/kernels/test_kernels.py -k remake_weights",
    ),
    Mutation(
        "rows whose maximum rose are left alone",
        f"{KERNELS}/rescale.py",
        "if factor != 1.0:",
        "if factor > 1.0:",
        "tests/kernels/test_kernels.py -k rescale_rows",
    ),
    Mutation(
        "the last tile of kept rows",
        f"{KERNELS}/settle.py",
        "n_entries = tl.minimum(vocab_tile, vocab_size - start)",
        "n_entries = vocab_size - start",
        "tests/kernels/test_kernels.py -k settle",
    ),
    Mutation(
        "rows of hidden's gradient",
        f"{KERNELS}/scatter_scaled.py",
        "row = tl.load(rows_ptr + token) if HAS_ROWS else token",
        "row = token",
        "tests/kernels/test_kernels.py -k scatter_scaled",
    ),
    Mutation(
        "the product kernel counts entries beyond the vocabulary",
        f"{KERNELS}/product_fold.py",
        "left_out = is_label if EVEN_V else is_label | (entries >= n_entries)[None, :]",
        "left_out = is_label",
        "tests/kernels/test_product_fold.py -k every_label",
    ),
    Mutation(
        "splits of the vocabulary are added in units of their own",
        f"{KERNELS}/product_fold.py",
        "mask=mask, other=0.0) * tl.exp(maxima - offset[None, :])",
        "mask=mask, other=0.0)",
        "tests/kernels/test_product_fold.py -k against_float64",
    ),
    # Divergences.
    Mutation(
        "the divergence's direction",
        f"{KERNELS}/fold.py",
        "cross += ref_e * tl.where(ref_e > 0, x - z, 0.0)",
        "cross += ref_e * tl.where(ref_e > 0, z - x, 0.0)",
        "tests/ops/test_kl.py -k 'fold_of_pairs or tiles_both_ways'",
    ),
    Mutation(
        "the label's column of the divergence's gradient",
        BACKWARD,
        "label += gathered.difference * (dkl * factor)",
        "label -= gathered.difference * (dkl * factor)",
        "tests/ops/test_kl.py -k 'float32_against_float64 and torch'",
    ),
    Mutation(
        "the log-probs' part of a divergence's gradient",
        BACKWARD,
        "policy = gathered.share * ((dkl - dlogps) * factor)",
        "policy = gathered.share * ((dkl + dlogps) * factor)",
        "tests/ops/test_kl.py -k 'float32_against_float64 and torch'",
    ),
    Mutation(
        "the label's column of the divergence's gradient, with a frozen head",
        PASSES,
        "k.mul_(c).addcmul_(rows, (c * difference).unsqueeze(1))",
        "k.mul_(c).addcmul_(rows, (-c * difference).unsqueeze(1))",
        "tests/ops/test_kl.py -k 'float32_against_float64 and torch'",
    ),
    Mutation(
        "the reference's part of the divergence's gradient",
        TORCH,
        "_exp_(x.sub_(ref_unit.unsqueeze(1))).mul_(ref_factor.unsqueeze(1))",
        "_exp_(x.sub_(ref_unit.unsqueeze(1))).mul_(factor.unsqueeze(1))",
        "tests/ops/test_kl.py -k 'float32_against_float64 and torch'",
    ),
    Mutation(
        "the reference's factor in the divergence's gradient",
        BACKWARD,
        "reference = gathered.ref_share * (dkl * -factor)",
        "reference = gathered.ref_share * -dkl",
        "tests/ops/test_kl.py -k 'float32_against_float64 and torch'",
    ),
    Mutation(
        "p_y - r_y of confident models loses its digits",
        "prefkern/ops/fold_state.py",
        "folded.miss < 0.5, ref_folded.miss - folded.miss, folded.hit - ref_folded.hit",
        "folded.miss < 0, ref_folded.miss - folded.miss, folded.hit - ref_folded.hit",
        "tests/ops/test_kl.py -k 'confident_models and torch'",
    ),
    Mutation(
        "a divergence of confident models loses its digits",
        "prefkern/ops/fold_state.py",
        "        -ref_folded.miss * gap,\n",
        "        ref_folded.hit * gap - gap,\n",
        "tests/ops/test_kl.py -k 'confident_models and torch'",
    ),
    Mutation(
        "a divergence's gradient reads the kept probabilities of a reference's first tokens",
        BACKWARD,
        'pair |= {"ref_tile": gathered.ref_kept[tokens, entries], "is_kept": True}',
        'pair |= {"ref_tile": gathered.ref_kept[:n, entries], "is_kept": True}',
        "tests/ops/test_kl.py -k 'kept_probabilities and torch'",
    ),
    Mutation(
        "a reference's probabilities are kept where the policy's are",
        PASSES,
        "rooms = ref_state[part], ref_buffers, gathered.ref_kept, None, gathered.kl_derivative",
        "rooms = ref_state[part], ref_buffers, gathered.kept, None, gathered.kl_derivative",
        "tests/ops/test_kl.py -k 'kept_probabilities and torch'",
    ),
    Mutation(
        "kept probabilities of both models are taken for logits",
        BACKWARD,
        '"is_kept": True}',
        '"is_kept": False}',
        "tests/ops/test_kl.py -k 'kept_probabilities and torch'",
    ),
    Mutation(
        "kept probabilities of both models are taken for logits in the kernel",
        f"{KERNELS}/remake_weights.py",
        "IS_KEPT=is_kept,",
        "IS_KEPT=False,",
        "tests/ops/test_kl.py -k remake_weights_of_pairs",
    ),
    Mutation(
        "the label's gradient is not written over what is kept",
        TORCH,
        "torch.where(inside.unsqueeze(1), label_gradient.unsqueeze(1), kept)",
        "torch.where((inside & (not is_kept)).unsqueeze(1), label_gradient.unsqueeze(1), kept)",
        "tests/ops/test_kl.py -k 'kept_probabilities and torch'",
    ),
    Mutation(
        "the scale of float16 stays in the gradient of hidden",
        BACKWARD,
        "        dstates.mul_(factors.scale)",
        "        pass",
        "tests/ops/test_kl.py -k 'kept_probabilities and torch'",
    ),
    Mutation(
        "a divergence's gradient of hidden is of the last tile of the vocabulary",
        BACKWARD,
        "add = product if entries.start == 0 else add_product\n                add(weights, plan",
        "add = product\n                add(weights, plan",
        "tests/ops/test_kl.py -k 'kept_probabilities and torch'",
    ),
    Mutation(
        "a divergence's gradient of an adapter's states is made with the head's own columns",
        BACKWARD,
        "add(weights, plan.state_columns.of(w), dstates[tokens])",
        "add(weights, w[:, : plan.state_columns.width], dstates[tokens])",
        "tests/ops/test_kl.py -k 'adapter_on_the_head and torch'",
    ),
    Mutation(
        "a frozen adapter's columns at the label, with a divergence",
        PASSES,
        "rows = plan.state_columns.of(rows).index_select(0, indices)",
        "rows = rows[:, : d.shape[1]].index_select(0, indices)",
        "tests/ops/test_kl.py -k 'adapter_on_the_head and torch'",
    ),
    Mutation(
        "the second term of hidden's gradient is not scaled in the kernel",
        f"{KERNELS}/scatter_scaled.py",
        "value += other * tl.load(other_scale_ptr + token)",
        "value += other",
        "tests/ops/test_kl.py -k scatter_scaled_of_two_terms",
    ),
    Mutation(
        "the second term of hidden's gradient is not scaled",
        TORCH,
        "scaled.addcmul_(others[part], other_scale[part].unsqueeze(1))",
        "scaled.add_(others[part])",
        "tests/ops/test_kl.py -k 'scatter_scaled_of_two_terms or tiles_both_ways'",
    ),
    Mutation(
        "hidden's second term is of the first rows, part by part",
        TORCH,
        "scaled.addcmul_(others[part], other_scale[part].unsqueeze(1))",
        "scaled.addcmul_(others[: len(scaled)], other_scale[: len(scaled)].unsqueeze(1))",
        "tests/ops/test_kl.py -k scatter_scaled",
    ),
    Mutation(
        "the gradient of a divergence that has none is memory's",
        "prefkern/ops/autograd.py",
        "torch.zeros(shape, dtype=wide, device=device) if x is None",
        "torch.empty(shape, dtype=wide, device=device) if x is None",
        "tests/ops/test_kl.py -k 'one_output_alone and torch'",
    ),
    Mutation(
        "the gradient of a divergence that has none is memory's, under torch.compile",
        "prefkern/ops/compiled.py",
        "dkl = torch.zeros_like(given)",
        "dkl = torch.empty_like(given)",
        "tests/ops/test_compile.py -k linear_kl",
    ),
    Mutation(
        "divergences are the first tokens', wherever scored, under torch.compile",
        "prefkern/ops/compiled.py",
        "            out.copy_(call.place(scored.masked(value), run.scored.rows, labels.shape))",
        "            out.copy_(call.place(scored.masked(value), run.scored.rows, labels.shape))\n"
        "            if value is passed.kl:\n"
        "                out.zero_()[: value.shape[0]].copy_(value)",
        "tests/ops/test_compile.py -k 'linear_kl or divergence'",
    ),
    Mutation(
        "under torch.compile, tokens that only fill the shape have a divergence",
        "prefkern/ops/compiled.py",
        "scored.masked(value), run.scored.rows",
        "value if value is passed.kl else scored.masked(value), run.scored.rows",
        "tests/ops/test_compile.py -k records",
    ),
    Mutation(
        "statistics stand still in a pass with a divergence",
        TORCH,
        "    if shifted is not None:\n        moved",
        "    if shifted is not None and x is None:\n        moved",
        "tests/ops/test_kl.py tests/ops/test_fold_state.py -k 'fold_of_pairs or two_parts'",
    ),
    Mutation(
        "statistics stand still in the kernel of a divergence",
        f"{KERNELS}/fold.py",
        "HAS_STATS=shifted is not None,",
        "HAS_STATS=shifted is not None and ref_tile is None,",
        "tests/ops/test_kl.py -k fold_of_pairs",
    ),
    # Parts of the vocabulary.
    Mutation(
        "two states' maximum is the first one's",
        "prefkern/ops/fold_state.py",
        "maximum = torch.maximum(self.maximum, other.maximum)",
        "maximum = self.maximum",
        "tests/ops/test_fold_state.py",
    ),
    Mutation(
        "the spread of a part stays about its own maximum",
        "prefkern/ops/fold_state.py",
        "shifted = (self.shifted + moved) * factor",
        "shifted = self.shifted * factor",
        "tests/ops/test_fold_state.py",
    ),
    Mutation(
        "a part without a logit makes the spread NaN",
        "prefkern/ops/fold_state.py",
        "moved = torch.where(self.total > 0, (self.maximum - offset) * self.total, 0.0)",
        "moved = (self.maximum - offset) * self.total",
        "tests/ops/test_fold_state.py",
    ),
    Mutation(
        "a part's squares move like its sum",
        "prefkern/ops/fold_state.py",
        "self.squares * factor * factor",
        "self.squares * factor",
        "tests/ops/test_fold_state.py",
    ),
    Mutation(
        "parts of a divergence are added in units of their own",
        "prefkern/ops/fold_state.py",
        "self.cross * factor",
        "self.cross",
        "tests/ops/test_fold_state.py",
    ),
    # A head over several ranks.
    Mutation(
        "ranks that do not have the label send -inf for it",
        SHARDS,
        "label_logit = torch.where(inside, each.label_logit, 0.0)",
        "label_logit = each.label_logit",
        "tests/ops/test_shards.py -k exact",
    ),
    Mutation(
        "a rank's D stays relative to its own maximum",
        PASSES,
        "ops.rescale_rows(accumulator, factor)",
        "ops.rescale_rows(accumulator, torch.ones_like(factor))",
        "tests/ops/test_shards.py -k exact",
    ),
    Mutation(
        "a label of another rank has the row of an entry of this one",
        "prefkern/ops/operands.py",
        "rows.masked_fill_(~are_own(labels, entries).unsqueeze(1), 0.0)",
        "rows",
        "tests/ops/test_shards.py -k exact",
    ),
    Mutation(
        "each rank keeps its part of the gradient of hidden",
        BACKWARD,
        "add_up(shard, joined)",
        "pass",
        "tests/ops/test_shards.py -k exact",
    ),
    Mutation(
        "a shard without entries leaves its state as it was in memory",
        PASSES,
        "clear(*state.sums(), *state.moments(), state.cross)",
        "pass",
        "tests/ops/test_shards.py -k exact",
    ),
    Mutation(
        "the mean logit of a shard is over its own entries",
        PASSES,
        "vocab_size = plan.vocab_size if shard is None else shard.size",
        "vocab_size = plan.vocab_size",
        "tests/ops/test_shards.py -k exact",
    ),
    Mutation(
        "an entry that is not finite has the number of a row of its part",
        "prefkern/loss/nonfinite.py",
        "lambda row: str(row + start)",
        "lambda row: str(row)",
        "tests/loss/test_loss_shards.py -k disagree",
    ),
    # Accelerate's context parallelism.
    Mutation(
        "a rank's part of a loss is averaged over the parts",
        CONTEXT_PARALLEL,
        "return items / self._cp_size",
        "return items",
        "tests/training/test_context_parallel.py -k gradients",
    ),
    Mutation(
        "labels are shifted in parts",
        CONTEXT_PARALLEL,
        '"shift_labels": _padded(align_labels(labels), length, IGNORE_INDEX),',
        '"shift_labels": _padded(labels, length, IGNORE_INDEX),',
        "tests/training/test_context_parallel.py -k shifted",
    ),
    Mutation(
        "statistics of tokens are of one rank's tokens",
        CONTEXT_PARALLEL,
        "dist.all_reduce(numerators, group=self._cp_mesh.get_group())",
        "pass",
        "tests/training/test_context_parallel.py -k gradients",
    ),
    Mutation(
        "a reference's attention does not reach other ranks",
        "prefkern/training/reference_trainer.py",
        "with self._cut(self._prepare_inputs(inputs)) as rows:",
        "with nullcontext(self._prepare_inputs(inputs)) as rows:",
        "tests/training/test_context_parallel.py -k gradients",
    ),
    # transformers' tensor parallelism.
    Mutation(
        "ranks with one batch gather it once for each",
        "prefkern/training/sharing.py",
        "return count > 1 and count == accelerator.num_processes",
        "return False",
        "tests/training/test_tensor_parallel.py -k gradients",
    ),
    Mutation(
        "with a head that is whole, ranks with one batch draw among all copies of it",
        "prefkern/objectives/running.py",
        "_sharing = (sequence_group or before[0], vocab_group or before[1])",
        "_sharing = (sequence_group, vocab_group)",
        "tests/training/test_tensor_parallel.py -k draws",
    ),
    Mutation(
        "the parts of a new adapter are drawn with one seed",
        TENSOR_PARALLEL,
        "if draw is not None and is_dtensor(first):",
        "if draw is not None and not is_dtensor(first):",
        "tests/training/test_tensor_parallel.py -k drawn",
    ),
    Mutation(
        "shards may overlap",
        SHARDS,
        "if start != reached and start != stop:",
        "if start > reached and start != stop:",
        "tests/ops/test_shards.py -k disagree",
    ),
    Mutation(
        "ranks may score other tokens",
        SHARDS,
        '"labels": checksum(labels),',
        "",
        "tests/ops/test_shards.py -k disagree",
    ),
    Mutation(
        "a rank of several begins again when its memory runs out",
        "prefkern/ops/call.py",
        "retries = shard is None and not",
        "retries = not",
        "tests/ops/test_memory.py -k ranks_of_one_head",
    ),
    # A sequence over several ranks.
    Mutation(
        "a rank's loss sees its own tokens alone",
        "prefkern/ops/parts.py",
        "dist.all_reduce(whole, group=group)",
        "pass",
        "tests/loss/test_loss_parts.py -k exact",
    ),
    Mutation(
        "each rank's loss counts in the gradient of a token",
        "prefkern/ops/parts.py",
        "return grads[0], None",
        "return grads[0] * dist.get_world_size(), None",
        "tests/loss/test_loss_parts.py -k exact",
    ),
    Mutation(
        "sums of a part are rounded before they are added",
        "prefkern/ops/parts.py",
        "sequences.sequence_sums(as_double(x), bounds) for x",
        "sequences.sequence_sums(as_double(x.bfloat16()), bounds) for x",
        "tests/loss/test_loss_parts.py -k 'exact or accurate'",
    ),
    Mutation(
        "the pair kernel counts one token a sequence",
        "prefkern/loss/pairwise.py",
        'backend == "triton" and scores.lengths_over_ranks is None',
        'backend == "triton"',
        "tests/loss/test_loss_parts.py -k accurate",
    ),
    Mutation(
        "statistics count a pair once for each rank of its group",
        "prefkern/objectives/running.py",
        "values = torch.zeros_like(values)",
        "pass",
        "tests/loss/test_loss_parts.py -k count_once",
    ),
    Mutation(
        "a draw is from the pairs of each rank of a group",
        "prefkern/objectives/running.py",
        "size if counting[each] == each else 0",
        "size",
        "tests/loss/test_loss_parts.py -k 'count_once or drawn'",
    ),
    Mutation(
        "labels that were shifted before they were cut are shifted again",
        "prefkern/models/scoring.py",
        'labels = batch["shift_labels"] if is_part',
        'labels = align_labels(batch["shift_labels"]) if is_part',
        "tests/models/test_sequence_parallel.py",
    ),
    Mutation(
        "ranks may have margins of other signs",
        "prefkern/ops/agreement.py",
        "return integers ^ (integers >> 32 & 0xFFFFFFFF)",
        "return integers",
        "tests/ops/test_shards.py -k checksum",
    ),
    Mutation(
        "ranks of a sequence may have heads of other sizes",
        "prefkern/ops/parts.py",
        '"weight": f"{entries} vocabulary entries",',
        "",
        "tests/loss/test_loss_parts.py -k disagree",
    ),
    # Tokens, sequences, packing.
    Mutation(
        "ignore_index is ignored",
        "prefkern/ops/sequences.py",
        "mask = labels != ignore_index",
        "mask = labels != -100",
        "tests/ops/test_linear_logprobs.py -k ignore_index",
    ),
    Mutation(
        "cu_seqlens count what is not scored",
        "prefkern/ops/sequences.py",
        "    offsets = None if bounds is None else before.index_select(0, bounds)\n"
        "    if count == labels.shape[0]:",
        "    offsets = bounds\n    if count == labels.shape[0]:",
        "tests/loss/test_loss.py -k 'packed_is_padded and torch'",
    ),
    Mutation(
        "a sequence's sum is added in float32",
        "prefkern/ops/sequences.py",
        'segment_reduce(values, "sum"',
        'segment_reduce(values.float(), "sum"',
        "tests/ops/test_sequences.py",
    ),
    Mutation(
        "a sequence is summed in float64 on a device that lacks it",
        "prefkern/devices.py",
        "return x.double() if has_float64(x.device) else x.cpu().double()",
        "return x.double()",
        "tests/loss/test_without_float64.py -k no_float64",
    ),
    Mutation(
        "running statistics follow a loss to a device without float64",
        "prefkern/objectives/running.py",
        "if not has_float64(fn(self.batches).device):",
        "if fn is None:",
        "tests/loss/test_without_float64.py -k statistics",
    ),
    Mutation(
        "a library that rounds its products passes for one that does not",
        "prefkern/ops/wide_products.py",
        "if bool((once == _SUM).all()) and bool((out == 2 * _SUM).all()):",
        "if once is not None:",
        "tests/ops/test_wide_products.py -k rounds",
    ),
    Mutation(
        "ROCm is asked for products that it was not tried with",
        "prefkern/ops/wide_products.py",
        'return device_type == "cuda" and torch.version.hip is None',
        'return device_type == "cuda"',
        "tests/ops/test_wide_products.py -k not_here",
    ),
    Mutation(
        "the pair kernel adds a sequence in float32",
        f"{KERNELS}/pair.py",
        "total += tl.load(logps_ptr + offsets, mask=offsets < end, other=0.0).to(tl.float64)",
        "total = (total + tl.load(logps_ptr + offsets, mask=offsets < end, other=0.0))"
        ".to(tl.float32).to(tl.float64)",
        "tests/ops/test_sequences.py",
    ),
    Mutation(
        "the first token of a sequence gets the gradient of the one before",
        "prefkern/ops/sequences.py",
        "torch.searchsorted(offsets[1:-1], tokens, right=True)",
        "torch.searchsorted(offsets[1:-1], tokens, right=False)",
        "tests/loss/test_loss.py -k 'test_against_float64 and torch'",
    ),
    Mutation(
        "labels are not shifted",
        "prefkern/models/scoring.py",
        "aligned = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)",
        "aligned = labels.clone()",
        "tests/models/test_models.py -k temperature",
    ),
    Mutation(
        "the last token of a packed sequence predicts the first of the next",
        "prefkern/models/scoring.py",
        "to(labels.device, torch.int64) - 1, IGNORE_INDEX)",
        "to(labels.device, torch.int64)[-1:] - 1, IGNORE_INDEX)",
        "tests/models/test_packing.py -k 'no_label or token_logprobs'",
    ),
    Mutation(
        "packed positions run on",
        "prefkern/models/paths.py",
        "return places - self.of_tokens(sent(begins, places.device))",
        "return places",
        "tests/models/test_packing.py -k token_logprobs",
    ),
    Mutation(
        "a sequence of a packed row sees the ones before it",
        "prefkern/models/paths.py",
        "outputs.append(original(module, q, k, v, mask, **kwargs)[0])",
        "outputs.append(original(module, q, key, value, mask, **kwargs)[0])",
        "tests/models/test_paths.py -k by_paths",
    ),
    Mutation(
        "a window is left out along a path",
        "prefkern/models/paths.py",
        "mask = attention_mask.of(length, prefix)",
        "mask = None",
        "tests/models/test_paths.py -k by_paths",
    ),
    Mutation(
        "positions along a path begin after its prefix again",
        "prefkern/models/paths.py",
        "q_length=length, q_offset=prefix, kv_length=prefix + length",
        "q_length=length, q_offset=0, kv_length=prefix + length",
        "tests/models/test_paths.py -k prefix",
    ),
    Mutation(
        "a path does not see its prefix",
        "prefkern/models/paths.py",
        "            if prefix:",
        "            if prefix > length:",
        "tests/models/test_paths.py -k prefix",
    ),
    Mutation(
        "a rejected response sees the chosen one's first token for its own prompt's",
        "prefkern/models/paths.py",
        "                before = slice(start, start + prefix)",
        "                before = slice(start + 2, start + prefix + 2)",
        "tests/training/test_share_prompt.py -k alone",
    ),
    Mutation(
        "a path's keys reach the kernel out of order",
        "prefkern/models/varlen.py",
        "order += range(piece[begin], piece[end])",
        "order += range(piece[begin], piece[end])[::-1]",
        "tests/models/test_varlen.py",
    ),
    Mutation(
        "a branch of a masked row sees its siblings",
        "prefkern/models/paths.py",
        "        low, high = starts[sequence], (starts + sizes)[sequence]",
        "        low, high = starts[sequence], (starts + 99)[sequence]",
        "tests/training/test_share_prompt.py -k trains_as_padded",
    ),
    Mutation(
        "a packed reward is of the last token, also where that is the pad token",
        "prefkern/models/scores.py",
        "    if pad is None:\n        return",
        "    if pad is not None:\n        return",
        "tests/training/test_reward_packing.py -k rewards_and_gradients",
    ),
    Mutation(
        "a reward after padding is not looked for in the shared prompt",
        "prefkern/models/scores.py",
        "torch.cat([places[first : first + length], places[start:end]])",
        "places[start:end]",
        "tests/training/test_reward_packing.py -k rewards_and_gradients",
    ),
    Mutation(
        "masked attention is planned as if it skipped half",
        "prefkern/models/body_cost.py",
        "numpy.where(masked, n * (before + n), n * (n + 1) // 2)",
        "numpy.where(before > 0, n * (before + n), n * (n + 1) // 2)",
        "tests/models/test_body_cost.py -k 'counts_are and Llama-padded'",
    ),
    Mutation(
        "copies of a prefix's keys and values are not planned",
        "prefkern/models/body_cost.py",
        "int((is_copied * (before + n)).sum()) * keys_and_values",
        "int((is_copied * n).sum()) * keys_and_values",
        "tests/models/test_body_cost.py -k 'counts_are and Llama-shared'",
    ),
    Mutation(
        "the plan forgets the prompt's last token before a rejected response",
        "prefkern/cli/plan_pairs.py",
        "(numpy.minimum(self.prompts, 1) + self.responses[1:])",
        "(0 * self.prompts + self.responses[1:])",
        "tests/cli/test_plan_pairs.py -k without_a_prompt",
    ),
    Mutation(
        "windows of a masked row count along the row",
        "prefkern/models/paths.py",
        "mask_function(batch, head, positions[q], positions[k])",
        "mask_function(batch, head, q, k)",
        "tests/training/test_share_prompt.py -k trains_as_padded",
    ),
    Mutation(
        "positions of a branch restart",
        "prefkern/models/paths.py",
        "[end - n - before for end, n, (_, before) in shapes]",
        "[end - n for end, n, (_, before) in shapes]",
        "tests/training/test_share_prompt.py -k 'adapters or own_loops'",
    ),
    Mutation(
        "a shared prompt ends with the token that the branch repeats",
        "prefkern/data/collate.py",
        "(start, max(len(prompt) - 1, 0))",
        "(start, len(prompt))",
        "tests/training/test_share_prompt.py",
    ),
    Mutation(
        "a shared prompt counts once in a router's loss",
        "prefkern/models/paths.py",
        "            counts[start : start + length] += 1",
        "            counts[start : start + length] += 0",
        "tests/training/test_share_prompt.py -k trains_as_padded",
    ),
    # Batches by tokens.
    Mutation(
        "a batch of tokens takes a pair that has no room in it",
        "prefkern/training/token_batches.py",
        "            room[first] -= sizes[row]",
        "            room[first] -= sizes[row] // 2",
        "tests/training/test_token_batches.py -k every_pair_once",
    ),
    Mutation(
        "an epoch may have fewer batches than the first",
        "prefkern/training/token_batches.py",
        "    while len(batches) < count:",
        "    while len(batches) < min(count, 1):",
        "tests/training/test_token_batches.py -k 'every_pair_once or drawn_again'",
    ),
    Mutation(
        "a resumed run has the batches of the first epoch",
        "prefkern/training/token_batches.py",
        "        self._epoch = epoch\n",
        "        self._epoch = 0\n",
        "tests/training/test_token_batches.py -k 'shuffled_differently or one_on_padded'",
    ),
    Mutation(
        "a pair that fills a rank's last batch of an evaluation counts",
        "prefkern/training/token_trainer.py",
        "            values = torch.zeros_like(values)",
        "            values = values.clone()",
        "tests/training/test_ddp.py -k 'joint_batch and repeated'",
    ),
    Mutation(
        "sums of a batch by tokens go to the rows of another",
        "prefkern/training/reference_cache.py",
        "yield torch.cat([values[: len(each)] for values, each in by_rank])",
        "yield torch.cat([values[: len(each)].flip(0) for values, each in by_rank])",
        "tests/training/test_token_batches.py -k put_back_by_row",
    ),
    Mutation(
        "a path of the kernel does not see its prefix",
        "prefkern/models/varlen.py",
        "                order += range(piece[start], piece[start + length])",
        "                order += range(piece[start], piece[start])",
        "tests/models/test_varlen.py",
    ),
    Mutation(
        "a window of the kernel has one token more",
        "prefkern/models/varlen.py",
        "        return local_size - 1",
        "        return local_size",
        "tests/models/test_varlen.py",
    ),
    Mutation(
        "chunks of attention pass for a window",
        "prefkern/models/varlen.py",
        "    if local_size and _is_same(",
        "    if local_size or _is_same(",
        "tests/models/test_varlen.py -k 'known or no_kernel'",
    ),
    Mutation(
        "two windows of unequal sizes pass for equal",
        "prefkern/models/varlen.py",
        "return one.__code__ is other.__code__ and _is_same(*values)",
        "return one.__code__ is other.__code__",
        "tests/models/test_varlen.py -k known",
    ),
    Mutation(
        "a kernel is believed",
        "prefkern/models/varlen.py",
        "    if error <= _TOLERANCE:",
        "    if error <= 1e9:",
        "tests/models/test_varlen.py -k wrong",
    ),
    Mutation(
        "a kernel's gradients are believed",
        "prefkern/models/varlen.py",
        "        for x, y in zip(found, true, strict=True)",
        "        for x, y in zip(found[:1], true[:1], strict=True)",
        "tests/models/test_varlen.py -k wrong",
    ),
    Mutation(
        "a kernel's first use counts among a checkpointed layer's tensors",
        "prefkern/models/varlen.py",
        "problem = clean.submit(_problem, kernel, kind).result()",
        "problem = _problem(kernel, kind)",
        "tests/models/test_varlen.py -k checkpointed",
    ),
    Mutation(
        "the kernel leaves attention dropout out",
        "prefkern/models/paths.py",
        'return is_causal and not options.get("dropout") and not has_more',
        "return is_causal and not has_more",
        "tests/models/test_varlen.py -k no_kernel",
    ),
    Mutation(
        "the kernel takes attention in both directions",
        "prefkern/models/paths.py",
        'return is_causal and not options.get("dropout") and not has_more',
        'return not options.get("dropout") and not has_more',
        "tests/models/test_varlen.py -k does_not_know",
    ),
    Mutation(
        "a prompt that is too long loses its end",
        "prefkern/data/truncation.py",
        "prompt = prompt[-max(max_length - longest, 1) :]",
        "prompt = prompt[: max(max_length - longest, 1)]",
        "tests/data/test_data.py -k truncation",
    ),
    # What people have: frozen weights, adapters, rows, arguments.
    Mutation(
        "a reference pass leaves frozen weights trainable",
        "prefkern/models/own_reference.py",
        "            parameter.requires_grad_(requires_grad)",
        "            parameter.requires_grad_(parameter.requires_grad or requires_grad)",
        "tests/training/test_frozen.py",
    ),
    Mutation(
        "a trained adapter's reference is what it is now",
        "prefkern/models/own_reference.py",
        "                parameter.data = value.to(parameter.dtype)",
        "                parameter.data = parameter.data.clone()",
        "tests/training/test_initial_adapter.py tests/models/test_own_reference.py",
    ),
    Mutation(
        "a trained adapter's reference in shards is what it is now",
        "prefkern/models/own_reference.py",
        "                shard.copy_(self._values[name].to_local())",
        "                shard.copy_(trained[name])",
        "tests/training/test_fsdp.py -k trained",
    ),
    Mutation(
        "a reference's head stays gathered between steps",
        "prefkern/training/sharding.py",
        "        prepared.set_reshard_after_forward(True)",
        "        prepared.set_reshard_after_forward(False)",
        "tests/training/test_fsdp.py -k reference",
    ),
    Mutation(
        "a tied weight stays in two units of FSDP2",
        "prefkern/models/ties.py",
        "            if id(parameter) in tied and not parameter.requires_grad:",
        "            if id(parameter) in tied and parameter.requires_grad:",
        "tests/training/test_fsdp.py -k tied",
    ),
    Mutation(
        "a truncated shard of FSDP2 passes for whole",
        "prefkern/training/fsdp_files.py",
        "            if size < end:",
        "            if size < end // 2:",
        "tests/training/test_fsdp_files.py",
    ),
    Mutation(
        "a reference model's head is used after FSDP2 has freed it",
        "prefkern/training/objective_trainer.py",
        "        return values.detach().clone() if copies_head else values.detach()",
        "        return values.detach()",
        "tests/training/test_fsdp.py -k tdpo",
    ),
    Mutation(
        "a model in which nothing can move is trained",
        "prefkern/training/trainable.py",
        "    if any(parameter.requires_grad for parameter in model.parameters()):",
        "    if any(True for parameter in model.parameters()):",
        "tests/training/test_frozen.py",
    ),
    Mutation(
        "an optimizer of another model's parameters is used",
        "prefkern/training/trainable.py",
        "    if trained and not found:",
        "    if not trained and not found:",
        "tests/training/test_frozen.py",
    ),
    Mutation(
        "a finished run takes one more step",
        "prefkern/training/finished.py",
        "        if state.global_step >= state.max_steps:",
        "        if state.global_step > state.max_steps:",
        "tests/training/test_resume.py -k left_alone",
    ),
    Mutation(
        "a run that stopped early goes on",
        "prefkern/training/finished.py",
        "self.evaluations_without_improvement >= each",
        "self.evaluations_without_improvement > each",
        "tests/training/test_resume.py -k left_alone",
    ),
    Mutation(
        "a float32 head is probed without autocast",
        "prefkern/training/trainer.py",
        "            with self.accelerator.autocast():\n                head_transform(self.model)",
        "            if True:\n                head_transform(self.model)",
        "tests/training/test_trainer_features.py -k float32_head",
    ),
    Mutation(
        "the cache stays off after training",
        "prefkern/training/item_trainer.py",
        "            config.use_cache = use_cache",
        "            config.use_cache = False",
        "tests/training/test_trainer_features.py -k cache_is",
    ),
    Mutation(
        "parameters that the loss does not reach pass for training",
        "prefkern/training/trainable.py",
        "    if not is_reached:",
        "    if False:",
        "tests/training/test_frozen.py -k not_active",
    ),
    Mutation(
        "an autocast around the run keeps casts of the reference's values",
        "prefkern/models/own_reference.py",
        "            torch.clear_autocast_cache()",
        "            pass",
        "tests/training/test_frozen.py -k autocast_around",
    ),
    Mutation(
        "a finished run loses its last checkpoint to the best one",
        "prefkern/training/checkpoints.py",
        "limit, self.args.save_total_limit = self.args.save_total_limit, None",
        "limit = self.args.save_total_limit",
        "tests/training/test_resume.py -k earlier_best",
    ),
    Mutation(
        "a user's turn is scored as an answer",
        "prefkern/data/messages.py",
        "        if role not in ASSISTANT:",
        "        if role in ():",
        "tests/data/test_rows.py",
    ),
    Mutation(
        "the first answer of an HH dialogue is taken for the last",
        "prefkern/data/foreign.py",
        "rejected]).rfind(_ASSISTANT)",
        "rejected]).find(_ASSISTANT)",
        "tests/data/test_foreign.py -k hhs",
    ),
    Mutation(
        "the input of an Alpaca row is left out",
        "prefkern/data/foreign.py",
        "        texts = [row[column] for column in self.question]",
        "        texts = [row[column] for column in self.question[:1]]",
        "tests/data/test_foreign.py -k one_of_trls",
    ),
    Mutation(
        "a question that the responses repeat is put before them again",
        "prefkern/data/foreign.py",
        "    if is_text(chosen):\n        _check_repeated(",
        "    if not is_text(chosen):\n        _check_repeated(",
        "tests/data/test_foreign.py -k two_ways",
    ),
    Mutation(
        "prefkern data takes every token of a response for scored",
        "prefkern/data/shown.py",
        "(False, *(label >= 0 for label in labels[1:]))",
        "(False, *(at >= prompt for at in range(1, len(labels))))",
        "tests/cli/test_cli_data.py -k terminal",
    ),
    Mutation(
        "a text that has its end token gets a second one",
        "prefkern/data/formats.py",
        "        if ids and ids[-1] in self.end_ids:",
        "        if ids and ids[-1] == self.eos:",
        "tests/data/test_rows.py",
    ),
    Mutation(
        "a text that the other goes on from is dropped",
        "prefkern/data/tokenisation.py",
        "        if pair.stops:",
        "        if pair.stops and pair.unasked:",
        "tests/data/test_rows.py",
    ),
    Mutation(
        "empty prompts beside unread text are trained on",
        "prefkern/data/columns.py",
        "    if any(column.lower() in (*_QUESTIONS, *_SYSTEMS) for column in unread):",
        "    if any(column in () for column in unread):",
        "tests/data/test_rows.py",
    ),
    Mutation(
        "torch_dtype is ignored",
        "prefkern/keywords.py",
        'names = [name for name in ("dtype", "torch_dtype")',
        'names = [name for name in ("dtype",)',
        "tests/training/test_arguments.py",
    ),
    Mutation(
        "a number in quotes stays text in a nested option",
        "prefkern/training/options.py",
        "        if isinstance(value, str) and _is_number(value):",
        "        if isinstance(value, str) and not value:",
        "tests/training/test_arguments.py tests/cli/test_options.py",
    ),
    # Heads and options.
    Mutation(
        "LoRA's scaling on the head",
        "prefkern/models/heads.py",
        "states.append(a(layer.lora_dropout[name](x)) * layer.scaling[name])",
        "states.append(a(layer.lora_dropout[name](x)))",
        "tests/models/test_peft.py -k values_and_gradients",
    ),
    Mutation(
        "the columns of an adapter's gradient",
        BACKWARD,
        "of_states(slice(own, own + states[1][0][1]), *states[1])",
        "of_states(slice(0, states[1][0][1]), *states[1])",
        "tests/ops/test_lora_head.py -k values_and_gradients",
    ),
    Mutation(
        "temperature is ignored",
        "prefkern/ops/logprobs.py",
        "transform = Transform(float(logit_scale), softcap, float(temperature))",
        "transform = Transform(float(logit_scale), softcap)",
        "tests/ops/test_linear_logprobs.py -k float32_against_float64",
    ),
    Mutation(
        "the loss ignores its workspace",
        "prefkern/loss/fused.py",
        "            self.workspace_mb,\n            backend,\n            return_stats,",
        "            None,\n            backend,\n            return_stats,",
        "tests/ops/test_memory.py -k tile_of_forward",
    ),
    Mutation(
        "autocast's dtype is ignored",
        "prefkern/ops/operands.py",
        "return operands_for(torch.get_autocast_dtype(device), device)",
        "return operands_for(hidden.dtype, device)",
        "tests/ops/test_linear_logprobs.py -k autocast",
    ),
    Mutation(
        "under torch.compile, tokens that only fill the shape have a gradient",
        "prefkern/ops/compiled.py",
        "return scored.masked(grad if rows is None else grad.index_select(0, rows))",
        "return grad if rows is None else grad.index_select(0, rows)",
        "tests/ops/test_compile.py -k records",
    ),
    # A CPU's products.
    Mutation(
        "on a CPU logits are products of bfloat16 tensors",
        "prefkern/ops/operands.py",
        "return torch.float32 if self.upcasts else self.compute_dtype",
        "return self.compute_dtype",
        "tests/ops/test_cpu.py -k at_most_those",
    ),
    Mutation(
        "on a CPU the labels' terms are rounded with the others, and added again",
        PASSES,
        "label_value = torch.zeros_like(label_value)",
        "label_value = label_value.clone()",
        "tests/ops/test_cpu.py -k sums_that_cancel",
    ),
    Mutation(
        "on a CPU an adapter's gradient lacks the labels' terms",
        BACKWARD,
        "add_products(dlora, head.low_rank.hidden)",
        "pass",
        "tests/ops/test_cpu.py -k reach_every_gradient",
    ),
    Mutation(
        "equal labels overwrite each other's terms",
        BACKWARD,
        ".index_add_(0, places, values)",
        ".index_copy_(0, places, values)",
        "tests/ops/test_cpu.py -k reach_every_gradient",
    ),
    Mutation(
        "on a CPU the labels' terms of a bias are added elsewhere",
        BACKWARD,
        "local = labels - entries.start",
        "local = labels",
        "tests/ops/test_cpu.py -k fits_the_labels",
    ),
    Mutation(
        "a thread compiles ever more shapes",
        "prefkern/ops/cpu.py",
        "first = 0 if _is_full() else 1",
        "first = 1",
        "tests/ops/test_cpu_products.py -k more_and_more",
    ),
    Mutation(
        "threads that compiled enough stay",
        "prefkern/ops/cpu.py",
        "if pool is not None and any(are_full):",
        "if pool is None:",
        "tests/ops/test_cpu_products.py -k more_and_more",
    ),
    Mutation(
        "a library whose products of blocks are rounded is used",
        "prefkern/ops/cpu.py",
        "return torch.equal(out, (a @ b.t()).float())",
        "return True",
        "tests/ops/test_cpu_products.py -k otherwise",
    ),
    Mutation(
        "a row of blocks begins where the tile's does not",
        "prefkern/ops/cpu.py",
        "sizes = m, k, width, from_row, k, max(to_row, k)",
        "sizes = m, k, width, from_row, k, k",
        "tests/ops/test_cpu_products.py -k outside",
    ),
    Mutation(
        "an error leaves while other threads still write",
        "prefkern/ops/cpu.py",
        "concurrent.futures.wait(others)",
        "pass",
        "tests/ops/test_cpu_products.py -k all_have_ended",
    ),
    Mutation(
        "what is kept has the unit of the tile before",
        PASSES,
        "yield slice(at, stop), self.kept_factors[tokens, number]",
        "yield slice(at, stop), self.kept_factors[tokens, max(number - 1, 0)]",
        "tests/ops/test_cpu_products.py -k factors_of_their_own",
    ),
    Mutation(
        "on a CPU a rounded product adds up all entries",
        "prefkern/ops/operands.py",
        "size = min(_ENTRIES_OF_A_PRODUCT, max(vocab_size // 4, 256))",
        "pass",
        "tests/ops/test_cpu.py -k sums_that_cancel",
    ),
    Mutation(
        "on a CPU a tile has chosen tokens alone",
        "prefkern/ops/call.py",
        "if head.operands.rounds and scored.live is None and splits:",
        "if False:",
        "tests/ops/test_cpu.py -k sums_that_cancel",
    ),
    Mutation(
        "on a CPU the sums of a divergence's gradient are rounded",
        "prefkern/ops/operands.py",
        "return replace(self, rounds=False, upcasts=self.upcasts or self.rounds)",
        "return self",
        "tests/ops/test_cpu.py -k near_models",
    ),
    # Objectives.
    Mutation(
        "the ratio's clip is a floor",
        "prefkern/objectives/adaptive.py",
        "ratio = ratio.clamp(max=self.clip)",
        "ratio = ratio.clamp(min=self.clip)",
        "tests/objectives/test_objectives.py -k oracles",
    ),
    Mutation(
        "adaptive coefficients carry a gradient",
        "prefkern/objectives/contrastive.py",
        "    @torch.no_grad()\n    def coefficients",
        "    def coefficients",
        "tests/objectives/test_objectives.py -k oracles",
    ),
    Mutation(
        "chosen and rejected of the reference are swapped",
        "prefkern/objectives/contrastive.py",
        "ref_chosen, ref_rejected = pairs.reference(self._name)",
        "ref_rejected, ref_chosen = pairs.reference(self._name)",
        "tests/objectives/test_objectives.py -k oracles",
    ),
    Mutation(
        "label smoothing's share",
        "prefkern/objectives/links.py",
        "return (1 - smoothing) * losses + smoothing * flipped",
        "return (1 - smoothing) * flipped + smoothing * losses",
        "tests/objectives/test_objectives.py -k oracles",
    ),
    Mutation(
        "IPO's margin",
        "prefkern/objectives/contrastive.py",
        "return 1 / (2 * self.tau)",
        "return 1 / self.tau",
        "tests/objectives/test_objectives.py -k oracles",
    ),
    Mutation(
        "SPPO's rejected response should rise",
        "prefkern/objectives/links.py",
        "_square((rejected + 0.5) / shape)",
        "_square((rejected - 0.5) / shape)",
        "tests/objectives/test_objectives.py -k oracles",
    ),
    Mutation(
        "the forward KL is the reverse one",
        "prefkern/objectives/scores.py",
        '"forward_kl": -1.0',
        '"forward_kl": 0.0',
        "tests/objectives/test_objectives.py -k oracles",
    ),
    Mutation(
        "Omni-DPO's weight of the policy is a constant",
        "prefkern/objectives/links.py",
        "factor * torch.where(is_finite",
        "held * torch.where(is_finite",
        "tests/objectives/test_objectives.py -k 'oracles and omnidpo'",
    ),
    Mutation(
        "alpha-DPO's margin keeps its stop-gradient",
        "prefkern/objectives/alpha_dpo.py",
        "if self.stop_gradient:",
        "if True:",
        "tests/objectives/test_objectives.py -k 'oracles or mixes_the_reference'",
    ),
    Mutation(
        "the pair kernel's slope of NCA",
        f"{KERNELS}/pair_links.py",
        "dchosen = 0.5 * sigmoid(chosen) - sigmoid(-chosen)",
        "dchosen = sigmoid(chosen) - sigmoid(-chosen)",
        "tests/kernels/test_pair_kernel.py -k oracle",
    ),
    Mutation(
        "the pair kernel's NLL term is of every response",
        f"{KERNELS}/pair.py",
        "nll = tl.where(sum_w >= ref_w, 0.0, nll_weight)",
        "nll = nll_weight",
        "tests/kernels/test_pair_kernel.py -k oracle",
    ),
    Mutation(
        "TDPO2's divergence of chosen responses trains",
        "prefkern/objectives/tdpo.py",
        "chosen_kls.detach())",
        "chosen_kls)",
        "tests/objectives/test_objectives.py -k divergences",
    ),
    Mutation(
        "KTO's reference point is negative",
        "prefkern/objectives/kto.py",
        "totals[1].clamp(min=1)).clamp(min=0)",
        "totals[1].clamp(min=1))",
        "tests/objectives/test_objectives.py tests/loss/test_loss.py -k 'kto or oracles'",
    ),
    Mutation(
        "a mixture forgets its weights in torch",
        "prefkern/objectives/mixture.py",
        "return results[0].with_losses(self.weighted([result.losses for result in results]))",
        "return results[0].with_losses(sum(result.losses for result in results))",
        "tests/objectives/test_mixture.py -k oracles",
    ),
    Mutation(
        "a mixture's gradient in the pair kernel is its first objective's",
        "prefkern/loss/pairwise.py",
        "coefficients=objective.weighted(each.coefficients for each in launched)",
        "coefficients=out.coefficients",
        "tests/objectives/test_mixture.py -k one_launch",
    ),
    Mutation(
        "the pair kernel's gradient of rejected responses",
        f"{KERNELS}/pair.py",
        "drejected * beta * slope_l",
        "drejected * beta_w * slope_l",
        "tests/kernels/test_pair_kernel.py -k oracle",
    ),
    Mutation(
        "the pair kernel's clip",
        f"{KERNELS}/pair.py",
        "ratio = least(ratio, clip)",
        "ratio = -least(-ratio, -clip)",
        "tests/kernels/test_pair_kernel.py -k oracle",
    ),
    # Statistics and ranks.
    Mutation(
        "the statistics' momentum",
        "prefkern/objectives/running.py",
        "weight = torch.full_like(mean, 1 - self.momentum)",
        "weight = torch.full_like(mean, self.momentum)",
        "tests/objectives/test_statistics.py -k 'moments or first_batch'",
    ),
    Mutation(
        "statistics are a rank's own",
        "prefkern/objectives/running.py",
        "dist.all_reduce(values)",
        "pass",
        "tests/objectives/test_statistics.py -k two_ranks",
    ),
    Mutation(
        "BCO's mean of all batches is of the first alone",
        "prefkern/objectives/running.py",
        "weight = 1 / self.batches.clamp(min=1).double()",
        "weight = (self.batches == 1).double()",
        "tests/objectives/test_whole_batch.py -k bco_shifts",
    ),
    Mutation(
        "adaptive BCO's shift is the mean of plain rewards",
        "prefkern/objectives/bco.py",
        """        if self.adaptive is not None:
            chosen =""",
        """        if self.adaptive is not None and not self.training:
            chosen =""",
        "tests/objectives/test_whole_batch.py -k bco_shifts",
    ),
    Mutation(
        "under ld_alpha the push on a response has no NLL term",
        "prefkern/loss/pairwise.py",
        "gradients = sum(others, gradients)",
        "del others",
        "tests/loss/test_ld_alpha.py -k pushes",
    ),
    Mutation(
        "a second derivative does not see both factors of a product",
        "prefkern/objectives/links.py",
        "factor * torch.where(is_finite, loss, 0.0), bounded)",
        "held * loss + (factor - held) * loss.detach(), bounded)",
        "tests/objectives/test_declarations.py -k second_derivatives",
    ),
    Mutation(
        "AOT sorts each rank's pairs by themselves",
        "prefkern/objectives/aot.py",
        "return gather(values) if self.training else (values, slice(0, len(values)))",
        "return values, slice(0, len(values))",
        "tests/objectives/test_whole_batch.py -k two_ranks",
    ),
    Mutation(
        "a rejected response whose partner is on another rank has no gradient",
        "prefkern/objectives/aot.py",
        "torch.where(is_elsewhere, lent - lent.detach(), 0.0)",
        "torch.where(is_elsewhere, lent.detach() - lent.detach(), 0.0)",
        "tests/objectives/test_whole_batch.py -k two_ranks",
    ),
    Mutation(
        "tokens beyond the shorter response have the gradient of those within",
        "prefkern/ops/sequences.py",
        "alpha * weighed + whole]",
        "weighed + whole]",
        "tests/loss/test_ld_alpha.py -k 'gradcheck or logits'",
    ),
    Mutation(
        "the reference's sums have weights of their own",
        "prefkern/loss/pairwise.py",
        'sums_of(values["ref_logps"], offsets, responses, ld_alpha)',
        'sums_of(values["ref_logps"], offsets, responses, None)',
        "tests/loss/test_ld_alpha.py -k logits",
    ),
    Mutation(
        "the pair kernel weighs a chosen response's tokens alike, wherever they are",
        "kernels/prefkern_kernels/pair.py",
        "sum_w = (first_w + times(rest_w, ld_alpha)).to(tl.float32)",
        "sum_w = (first_w + rest_w).to(tl.float32)",
        "tests/kernels/test_pair_kernel.py -k 'beyond_the_shorter and dpo'",
    ),
    Mutation(
        "beside the pair kernel a gold response has no term",
        "prefkern/loss/pairwise.py",
        "losses = losses + of_gold",
        "losses = losses + 0.0 * of_gold",
        "tests/loss/test_gold.py -k 'every_path and triton'",
    ),
    Mutation(
        "a gold response's NLL is not per token",
        "prefkern/objectives/tpo.py",
        "means = logps / lengths.clamp(min=1)",
        "means = logps",
        "tests/objectives/test_tpo.py -k gold_log_probs",
    ),
    Mutation(
        "gold tokens count as rejected ones in the log",
        "prefkern/training/metrics.py",
        "is_rejected = (row >= pairs) & (row < 2 * pairs)",
        "is_rejected = row >= pairs",
        "tests/integrations/test_trl_tpo.py -k runs_are_trls",
    ),
    Mutation(
        "the cache of reference sums does not know ld_alpha",
        "prefkern/training/reference_trainer.py",
        '{"ld_alpha": self._sum_fn.ld_alpha}',
        "{}",
        "tests/training/test_ld_alpha.py -k precomputed",
    ),
    Mutation(
        "a checkpoint holds the reference before it moved",
        "prefkern/training/moving_reference.py",
        "weight.copy_(saved[name])",
        "weight.copy_(weight)",
        "tests/training/test_resume.py -k 'uninterrupted and moving'",
    ),
    Mutation(
        "evaluation moves alpha-DPO's statistics",
        "prefkern/objectives/alpha_dpo.py",
        "        if self.observes:\n            self.observe(pairs)",
        "        if True:\n            self.observe(pairs)",
        "tests/objectives/test_statistics.py -k evaluation",
    ),
    Mutation(
        "a rank's share of a step",
        "prefkern/training/item_trainer.py",
        "(items * self.accelerator.num_processes / num_items_in_batch)",
        "(items / num_items_in_batch)",
        "tests/training/test_ddp.py -k evaluated",
    ),
    Mutation(
        "accumulated batches count alike, whatever their size",
        "prefkern/training/item_trainer.py",
        "if num_items_in_batch is None:",
        "if True:",
        "tests/training/test_trainer.py tests/training/test_trainer_objectives.py -k accumulat",
    ),
    # What is kept on disk, and TRL's trainers.
    Mutation(
        "the cache's key does not know where responses end",
        "prefkern/training/reference_cache.py",
        "for numbers in (lengths, values):",
        "for numbers in (values,):",
        "tests/training/test_reference_cache.py",
    ),
    Mutation(
        "the cache's key does not know the logits transform",
        "prefkern/training/reference_cache.py",
        '"transform": [transform.logit_scale, transform.softcap],',
        '"transform": [],',
        "tests/training/test_reference_cache.py",
    ),
    Mutation(
        "the hash of a model whose weights ZeRO-3 holds is that of empty weights",
        "prefkern/training/reference_cache.py",
        'if any(is_traceable_wrapper_subclass(each) or hasattr(each, "ds_id") for each in parameters):',
        "if any(is_traceable_wrapper_subclass(each) for each in parameters):",
        "tests/training/test_zero_refusals.py -k no_copy_and_no_hash",
    ),
    Mutation(
        "under DeepSpeed a batch's sums are rounded to bfloat16",
        "prefkern/training/item_trainer.py",
        "if isinstance(data, Tensor) and data.is_floating_point():",
        "if False:",
        "tests/training/test_zero_refusals.py -k stay_float32",
    ),
    Mutation(
        "DeepSpeed's engine is taken for the model",
        "prefkern/models/heads.py",
        'elif not hasattr(type(model), "get_output_embeddings") and hasattr(model, "module"):',
        'elif not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):',
        "tests/training/test_zero_refusals.py -k engine",
    ),
    Mutation(
        "a truncated file of DeepSpeed passes for whole",
        "prefkern/training/zero.py",
        "with zipfile.ZipFile(file):",
        'with file.open("rb"):',
        "tests/training/test_zero_refusals.py -k damaged",
    ),
    Mutation(
        "a shard's checksum is not looked at",
        "prefkern/training/reference_cache.py",
        'if metadata.get("checksum") != _checksum(sums):',
        "if False:",
        "tests/training/test_reference_cache.py -k spoiled",
    ),
    Mutation(
        "ORPO's NLL in TRL is of the token itself",
        "prefkern/integrations/trl/head.py",
        'full = align_labels(rows["concatenated_input_ids"].masked_fill(~is_token, IGNORE_INDEX))',
        'full = rows["concatenated_input_ids"].masked_fill(~is_token, IGNORE_INDEX)',
        "tests/integrations/test_trl.py tests/integrations/test_trl_holding.py -k 'twins or terms'",
    ),
    Mutation(
        "labels that are shifted already are shifted again for TRL",
        "prefkern/integrations/trl/fused_forward.py",
        "aligned, columns = shift_labels, slice(None)",
        "aligned, columns = align_labels(shift_labels), slice(None)",
        "tests/integrations/test_trl_fuse_head.py -k answers",
    ),
    Mutation(
        "TRL's loss is a mean over the batch where a count is given",
        "prefkern/integrations/trl/fused_forward.py",
        "count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch",
        "count = mask.sum().clamp(min=1)",
        "tests/integrations/test_trl_fuse_head.py -k answers",
    ),
    Mutation(
        "the policy of GRPO is scored without its temperature",
        "prefkern/integrations/trl/asking.py",
        'options = {**options, "temperature": trainer.temperature}',
        "pass",
        "tests/integrations/test_trl_fuse_head.py -k temperature",
    ),
    Mutation(
        "the collision of TRL's WPO weights is that of a softer distribution",
        "prefkern/integrations/trl/fused_forward.py",
        "temperature=temperature / 2, **options",
        "temperature=temperature * 2, **options",
        "tests/integrations/test_trl_fuse_head.py -k 'answers or pairs'",
    ),
    Mutation(
        "fuse_head is not undone",
        "prefkern/integrations/trl/fused_forward.py",
        "self.is_active = False",
        "pass",
        "tests/integrations/test_trl_fuse_head.py -k undone",
    ),
    Mutation(
        "a copy of a fused model answers with the weights of the original",
        "prefkern/integrations/trl/fused_forward.py",
        "is_copy = inner, served.before, self is not base",
        "is_copy = inner, served.before, False",
        "tests/integrations/test_trl_fuse_head.py -k copy_of_the_model",
    ),
    Mutation(
        "a batch that ranks share is each rank's own through TRL",
        "prefkern/integrations/trl/dpo.py",
        "with counting_batches_once(self.accelerator):",
        "with nullcontext():",
        "tests/integrations/test_trl_ranks.py -k counts_once",
    ),
    Mutation(
        "precomputed sums of chosen and rejected are swapped in TRL",
        "prefkern/integrations/trl/dpo.py",
        'sums = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]',
        'sums = inputs["ref_rejected_logps"], inputs["ref_chosen_logps"]',
        "tests/integrations/test_trl.py -k 'twins or options_of_trl'",
    ),
    Mutation(
        "a decoder's labels are shifted in fuse_head",
        "prefkern/integrations/trl/head.py",
        "return labels if self.trainer.is_encoder_decoder else align_labels(labels)",
        "return align_labels(labels)",
        "tests/integrations/test_trl_habits.py -k encoder_decoder",
    ),
    Mutation(
        "a packed batch of TRL's has the bounds of its rows in another order",
        "prefkern/integrations/trl/batches.py",
        "F.pad(is_token.sum(1).cumsum(0), (1, 0)).int()",
        "F.pad(is_token.sum(1).sort().values.cumsum(0), (1, 0)).int()",
        "tests/integrations/test_trl_habits.py -k packed",
    ),
    Mutation(
        "num_tokens starts again with each log",
        "prefkern/training/objective_trainer.py",
        "self._num_tokens += int(tokens[0].item())",
        "self._num_tokens = int(tokens[0].item())",
        "tests/integrations/test_trl_habits.py -k counts_tokens",
    ),
    # Memory.
    Mutation(
        "what forward kept is not given back",
        "prefkern/ops/autograd.py",
        "x.untyped_storage().resize_(0)",
        "pass",
        "tests/ops/test_memory.py -k gives_back",
    ),
    Mutation(
        "any error is taken for a lack of memory",
        "prefkern/ops/memory.py",
        "return isinstance(error, torch.OutOfMemoryError) or _CPU_REFUSAL in str(error)",
        "return True",
        "tests/ops/test_memory.py -k 'other_errors or these_words'",
    ),
    # Derivatives of derivatives, and what is not finite.
    Mutation(
        "a second derivative raises by way of a plain backward alone",
        "prefkern/ops/once.py",
        "given = (*ctx.anchors, *(g for g in grads if g is not None))",
        "given = (torch.zeros((), requires_grad=True),)",
        "tests/ops/test_once.py -k 'differentiated or hessian'",
    ),
    Mutation(
        "a second derivative raises unless it is one of the incoming gradient",
        "prefkern/ops/once.py",
        "given = (*ctx.anchors, *(g for g in grads if g is not None))",
        "given = ctx.anchors",
        "tests/ops/test_once.py -k differentiated",
    ),
    Mutation(
        "hidden states are held until backward",
        "prefkern/ops/once.py",
        "x[..., :0].clone()",
        "x[..., :0]",
        "tests/ops/test_once.py -k held",
    ),
    Mutation(
        "a label that the reference rules out makes a divergence NaN",
        "prefkern/ops/fold_state.py",
        "torch.where(ref_folded.hit > 0, ref_folded.hit * gap, 0.0)",
        "ref_folded.hit * gap",
        "tests/ops/test_kl.py -k 'ruled_out and torch'",
    ),
    Mutation(
        "kernels read what memory holds, and not its negative",
        "prefkern/ops/operands.py",
        "return None if x is None else x.resolve_neg()",
        "return x",
        "tests/ops/test_negated.py",
    ),
    Mutation(
        "a head is read from memory that holds its negative",
        "prefkern/ops/operands.py",
        "return Head(_flat(hidden), weight.resolve_neg(), bias",
        "return Head(_flat(hidden), weight, bias",
        "tests/ops/test_negated.py",
    ),
    Mutation(
        "heads that begin at one place are one head",
        "prefkern/ops/operands.py",
        "        or (a.data_ptr(), a.shape, a.stride(), a.dtype)\n"
        "        == (b.data_ptr(), b.shape, b.stride(), b.dtype)\n",
        "        or a.data_ptr() == b.data_ptr()\n",
        "tests/loss/test_loss.py -k is_another_head",
    ),
    Mutation(
        "the plan of an output leaves out a reference through its own head",
        "prefkern/ops/plan.py",
        "forward_operations=self.forward_operations + reference.forward_operations,",
        "forward_operations=self.forward_operations,",
        "tests/loss/test_loss.py -k plan_of_an_output",
    ),
    # Adapters and checkpoints.
    Mutation(
        "an adapter's base is changed by its initialiser, and is the reference",
        "prefkern/models/adapters.py",
        '_ALTERS_BASE = ("pissa", ',
        "_ALTERS_BASE = (",
        "tests/models/test_peft.py -k 'initial or base'",
    ),
    Mutation(
        "the best checkpoint is deleted where the folder is spelt otherwise",
        "prefkern/training/checkpoint_files.py",
        "kept = {path.resolve() for path in keep}",
        "kept = {*keep}",
        "tests/training/test_resume.py -k best_checkpoint",
    ),
    Mutation(
        "a response that says nothing is trained on",
        "prefkern/data/tokenisation.py",
        "is_empty = pair.empty or ends_only(found) or not _can_be_scored(found)",
        "is_empty = not _can_be_scored(found)",
        "tests/data/test_data.py -k 'empty or nothing'",
    ),
    Mutation(
        "the pictures of a batch stand beside the rows of other prompts",
        "prefkern/data/picture_batches.py",
        "torch.cat([value] * sides)",
        "value.repeat_interleave(sides, 0)",
        "tests/training/test_pictures.py -k own_logits",
    ),
    Mutation(
        "the tokens of a picture pass for text",
        "prefkern/data/picture_batches.py",
        "made[name][at, : len(own)] = own",
        "made[name][at, : len(own)] = 0 * own",
        "tests/training/test_pictures.py -k 'own_logits and Gemma'",
    ),
    Mutation(
        "a prompt with a picture is cut",
        "prefkern/data/pictures.py",
        "len(kept[0]) == len(found[0])",
        "len(kept[0]) <= len(found[0])",
        "tests/data/test_pictures.py -k cannot_be_read",
    ),
    Mutation(
        "the pictures of single responses stand beside those of other rows",
        "prefkern/data/tokenisation.py",
        "kept.select(of_rows[:])",
        "kept.select([*range(len(kept))] * len(sides))",
        "tests/data/test_pictures.py -k of_single_responses",
    ),
    Mutation(
        "pictures after the first rows of a stream are left out",
        "prefkern/training/data_trainer.py",
        "refuse_streamed_pictures(rows.column_names, name)",
        "pass",
        "tests/training/test_picture_runs.py -k after_the_first_rows",
    ),
    Mutation(
        "the cache of reference sums does not know the pictures",
        "prefkern/training/reference_trainer.py",
        'pictures["pictures"] = hash_pictures(dataset, self.processing_class)',
        'pictures["pictures"] = "some"',
        "tests/training/test_picture_runs.py -k sums_are",
    ),
    Mutation(
        "responses to other pictures are no mismatch",
        "prefkern/data/collate.py",
        'asked = [(list(example["prompt_ids"]), pictures_of(example)) for example in examples]',
        'asked = [(list(example["prompt_ids"]), []) for example in examples]',
        "tests/training/test_pictures.py -k 'single_responses and Gemma'",
    ),
    Mutation(
        "mismatched responses score the turns of others",
        "prefkern/data/collate.py",
        "mismatched.append((cut, response, labels[other][: len(response)]))",
        "mismatched.append((cut, response, response))",
        "tests/training/test_turns.py -k kto",
    ),
    Mutation(
        "the cache of reference sums does not know which tokens are scored",
        "prefkern/training/reference_cache.py",
        "columns = [*_TOKEN_COLUMNS, *masks]",
        "columns = [*_TOKEN_COLUMNS]",
        "tests/training/test_turns.py -k precomputed",
    ),
    Mutation(
        "marks that cover a user's turn are taken",
        "prefkern/data/turns.py",
        "    _check_others(encoded, mask, rendering)\n",
        "",
        "tests/data/test_turns.py -k 'white_space or show'",
    ),
    Mutation(
        "a last turn begins before its header",
        "prefkern/data/turns.py",
        "asked = render(tokenizer, before, options, add_generation_prompt=True)",
        "asked = render(tokenizer, before, options)",
        "tests/data/test_turns.py -k last_turn",
    ),
    Mutation(
        "a stream resumes on other rows",
        "prefkern/training/streams.py",
        "if theirs != dataset.description:",
        "if theirs is None:",
        "tests/training/test_streams.py -k another",
    ),
    Mutation(
        "ranks are read as scores",
        "prefkern/data/rankings.py",
        "sign = -1 if self.value in _RANKS else 1",
        "sign = 1",
        "tests/data/test_rankings.py",
    ),
    Mutation(
        "tokens are counted in float32",
        "prefkern/training/metrics.py",
        "torch.stack([count, torch.ones_like(count)]).long()",
        "torch.stack([count.float(), torch.ones_like(count).float()])",
        "tests/training/test_metrics.py -k exactly",
    ),
    Mutation(
        "plan counts two responses of TPO",
        "prefkern/cli/plan_pairs.py",
        'sides = ("chosen", "rejected", GOLD)',
        'sides = ("chosen", "rejected")',
        "tests/cli/test_plan_pairs.py -k gold",
    ),
    Mutation(
        "streams of other weights resume",
        "prefkern/data/streams.py",
        '"weights": self._weights,',
        '"weights": None,',
        "tests/training/test_streams.py -k mixed_by_weights",
    ),
    Mutation(
        "streams are drawn from alike",
        "prefkern/data/streams.py",
        "drawn.choices(range(len(rows)), weights)",
        "drawn.choices(range(len(rows)))",
        "tests/training/test_streams.py -k mixed_by_weights",
    ),
    Mutation(
        "a stream's batches are cut between ranks",
        "prefkern/training/streams.py",
        "args.accelerator_config.dispatch_batches = False",
        "pass",
        "tests/training/test_streams.py -k ranks",
    ),
    Mutation(
        "weights of datasets are not read",
        "prefkern/data/mixing.py",
        "probabilities=probabilities, seed=seed",
        "seed=seed",
        "tests/training/test_mixing.py -k weights",
    ),
)


def _copy(root: Path) -> None:
    """A copy of the present tree, without files that runs have left in it."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for file in (*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "Makefile"):
        shutil.copy(file, root)


def _pytest(root: Path, tests: str) -> tuple[int | None, str]:
    """pytest's exit status, None after `SECONDS`, and the first test that failed."""
    environment = {
        **os.environ,
        # The copy, wherever prefkern is installed from; and no bytecode, whose time of writing
        # cannot tell two texts of one second and size apart.
        "PYTHONPATH": os.pathsep.join(str(root / folder) for folder in PATH),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    with subprocess.Popen(
        [*command, *shlex.split(tests)],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            said, _ = run.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            # Ranks that wait for one another are its children.
            os.killpg(run.pid, 9)
            return None, ""
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
    return run.returncode, failed.group(1) if failed else said[-500:]


class _Copies:
    """A copy of the tree for each worker."""

    def __init__(self, folder: Path, count: int) -> None:
        self._free: queue.Queue[Path] = queue.Queue()
        for number in range(count):
            _copy(folder / str(number))
            self._free.put(folder / str(number))

    def attempt(self, mutation: Mutation) -> Outcome:
        root = self._free.get()
        try:
            outcome = self._attempt(mutation, root)
        finally:
            self._free.put(root)
        print(f"{outcome.status:9} {mutation.breaks}: {outcome.killed_by}", flush=True)
        return outcome

    def _attempt(self, mutation: Mutation, root: Path) -> Outcome:
        outcome = Outcome(**mutation._asdict(), status="not found", date=date.today().isoformat())
        try:
            text = mutation.applied(root)
        except LookupError as error:
            outcome.killed_by = str(error)
            return outcome
        file = root / mutation.file
        original, start = file.read_text(), time.perf_counter()
        try:
            file.write_text(text)
            status, failed = _pytest(root, mutation.tests)
        finally:
            file.write_text(original)
        outcome.seconds = round(time.perf_counter() - start, 1)
        # 1: a test failed. Anything else than that or 0 says nothing about the tests.
        outcome.status = {None: "timeout", 0: "survived", 1: "killed"}.get(status, "not run")
        outcome.killed_by = failed if outcome.status in ("killed", "not run") else ""
        if outcome.status == "killed" and _pytest(root, shlex.quote(failed))[0] != 0:
            outcome.status = "not run"
            outcome.killed_by = f"without the change it fails as well: {failed}"
        return outcome


def page(report: dict[str, Any]) -> str:
    counts = Counter(row["status"] for row in report["mutations"])
    last = max(row["date"] for row in report["mutations"])
    head = HEAD.format(date=last, killed=counts["killed"], tried=counts.total())
    rows = [
        f"| {row['breaks']} | `{row['file']}` | "
        + (f"`{_short(row['killed_by'])}`" if row["status"] == "killed" else row["status"])
        + f" | {row['seconds']:.0f} |"
        for row in report["mutations"]
    ]
    return head + "\n".join(rows) + "\n"


def _short(test: str) -> str:
    """A test's file and name, without parameters: a `|` in them would end a cell of the table."""
    return test.split("[")[0].removeprefix("tests/")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="those whose description or file has this text")
    parser.add_argument("--new", action="store_true", help="those that are not recorded as killed")
    options = parser.parse_args(arguments)
    known = _killed() if options.new else {}
    chosen = [
        each
        for each in MUTATIONS
        if each not in known and options.only in f"{each.breaks} {each.file}"
    ]
    if options.only and not chosen:
        parser.error(f"--only {options.only!r}: no mutation has it")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.workers) as pool:
        attempt = _Copies(Path(folder), options.workers).attempt
        known |= dict(zip(chosen, map(asdict, pool.map(attempt, chosen)), strict=True))
    rows = [known[each] for each in MUTATIONS if each in known]
    report = {"mutations": rows}
    if not options.only:
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
        PAGE.write_text(page(report))
    counts = Counter(row["status"] for row in rows)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(counts["killed"] != len(rows))


def _killed() -> dict[Mutation, dict[str, Any]]:
    """The record's rows of killed mutations that have not changed since."""
    if not RESULT.exists():
        return {}
    rows = json.loads(RESULT.read_text())["mutations"]
    names = Mutation._fields
    return {
        Mutation(*(row[name] for name in names)): row for row in rows if row["status"] == "killed"
    }


def check(mutation: Mutation) -> None:
    """Raise unless the mutation fits its file once and the result is Python."""
    text = mutation.applied(ROOT)
    assert text != (ROOT / mutation.file).read_text(), mutation
    ast.parse(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
