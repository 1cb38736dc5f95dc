"""Compare every causal LM of transformers, built tiny, with its own logits, and write the page.

usage: python bench/families.py [--json FILE] [--page FILE] [NAME ...]

There are two tables. The first has the families of `tests/support/family_table.py`, with softcaps
and scales that change the logits visibly; models with images run with and without an image. The
second has every class of transformers' auto mappings for causal LMs and for images with text, on
text alone. Its config has the default values, but each size with a known name is small, also in
nested configs. `prefkern.token_logprobs` and its gradients with respect to all parameters are
compared with log_softmax of the model's own logits, in float32.

The result of a class is one of
    agrees      its errors are within the bounds
    refused     prefkern raises an error that says why; never a wrong number
    not run     the model itself does not run or train on text alone, or could not be built tiny
    differs     a wrong number without an error: exit status 1
and packed rows, with and without shared prompts, are compared with their sequences.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import prefkern
from prefkern.data.collate import PreferenceCollator
from prefkern.models.packing import reads_whole_row
from prefkern.models.transform import HeadTransform, head_transform
from prefkern_bench import environment
from small_models import OWN, build
from support import family_table
from support.family_table import FAMILIES, VISION, Family

# Bounds on the error of a value, in nats, and of a gradient, relative to the largest entry of its
# parameter's gradient.
BOUNDS = {"value": 1e-4, "gradient": 1e-3}
COLUMNS = ("after the head", "value", "gradient", "packed", "prompt shared")
# Parts of the errors about packing, by which classes are listed.
REASONS = (
    "its forward takes no position_ids",
    "sequences in one row see one another",
    "`causal_conv1d_fn` can't keep packed sequences apart",
    "its hidden states in a packed row differ from those in a padded batch",
)
STATUSES = ("agrees", "refused", "not run", "differs")
HEAD = """\
# Model families

Written by `{command}` on {date}; {versions}.

Log-probs and gradients through prefkern, compared with log_softmax of the model's own logits, in
float32 on tiny random models. Value: the largest error of a token's log-prob, in nats. Gradient:
the largest error of a parameter's gradient, relative to the largest entry of that gradient, over
all parameters. After the head: the logits transform that was read from the config and checked
against the model.

Packed: how a row of several sequences is computed (`padding_free`). "by paths": each sequence
attends to itself alone. "masked": attention is computed over the whole row and masked. "refused":
an error, because sequences would see one another, or positions would run on. Where a row is
packed, its log-probs and gradients agree with those of each sequence alone, within the same bounds
(in PaliGemma, which computes a lone row otherwise than a padded one, with those of a padded batch).
Prompt shared: the same for a row in which a pair's prompt stands once (`share_prompt`); losses and
gradients agree with those of the padded pairs.

## Families of the tests

Softcaps are low and scales are far from 1, so that a missed or misread one would show.
"""


@dataclass
class Row:
    model: str
    status: str = "not run"
    transform: str = ""
    value_error: float | None = None
    gradient_error: float | None = None
    why: str = ""
    # How a packed row is computed: by paths, masked, refused, or differs.
    packing: str = ""
    why_not_packed: str = ""
    # How a row in which a pair's prompt stands once is computed.
    sharing: str = ""
    why_not_shared: str = ""


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def measure(row: Row, made: Callable[[], tuple[nn.Module, tuple[Tensor, ...], dict]]) -> Row:
    """Fill a row: `made()` returns a model, its ids, mask and labels, and further inputs."""
    try:
        model, batch, inputs = made()
        expected = family_table.oracle(model, *batch, **inputs)
        theirs = gradients(model, expected)
    except Exception as error:  # noqa: BLE001, what a model raises is a result
        row.why = reason(error)
        return row
    try:
        actual = prefkern.token_logprobs(model, *batch, **inputs)
        ours = gradients(model, actual)
        row.transform = described(head_transform(model))
    except Exception as error:  # noqa: BLE001
        row.status, row.why = "refused", reason(error)
        return row
    row.value_error, row.gradient_error = errors(actual, expected, ours, theirs)
    row.status = "agrees" if within_bounds(row.value_error, row.gradient_error) else "differs"
    if not inputs:
        pack(row, model)
        share(row, model)
    return row


def errors(
    actual: Tensor, expected: Tensor, ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> tuple[float, float]:
    """The largest error of a log-prob, and of a gradient relative to its largest entry."""
    # If a parameter's gradient is only rounding, its error is relative to the model's largest
    # entry.
    floor = 1e-3 * max(gradient.abs().max() for gradient in theirs.values())
    of_gradients = []
    for each in ours.keys() | theirs.keys():
        # An expert that no token chose has no gradient, or one of zeros.
        mine, true = ours.get(each), theirs.get(each)
        difference = torch.zeros(()) if mine is None else mine
        difference = difference if true is None else difference - true
        size = floor if true is None else true.abs().max().clamp(min=floor)
        of_gradients.append((difference.abs().max() / size).item())
    # max() would pass over NaN.
    return (actual - expected).abs().max().item(), torch.tensor(of_gradients).max().item()


def within_bounds(value: float, gradient: float) -> bool:
    # Comparisons are <=, so that NaN counts as "differs".
    return value <= BOUNDS["value"] and gradient <= BOUNDS["gradient"]


# Lengths of the sequences of a packed row. The first is longer than the small windows.
PACKED = (41, 7, 1, 23)


def pack(row: Row, model: nn.Module) -> None:
    """Compare a packed row with its sequences, alone or padded: values and gradients."""
    bounds = torch.tensor([0, *PACKED]).cumsum(0)
    ids = torch.randint(3, 90, (1, int(bounds[-1])), generator=torch.Generator().manual_seed(5))
    try:
        packed = prefkern.token_logprobs(model, ids, cu_seqlens=bounds)
        ours = gradients(model, packed)
    except Exception as error:  # noqa: BLE001
        row.packing, row.why_not_packed = "refused", reason(error, 400)
        return
    row.packing = "masked" if reads_whole_row(model) else "by paths"
    found = []
    # PaliGemma computes a lone row otherwise than a padded one, and Gemma 3n a pad token's gradient
    # as NaN.
    for oracle in (alone, padded):
        expected = oracle(model, ids, bounds)
        found.append(errors(packed, expected, ours, gradients(model, expected)))
        if within_bounds(*found[-1]):
            return
    row.why_not_packed = f"{row.packing}: " + ", ".join(f"{x:.0e} and {y:.0e}" for x, y in found)
    row.packing = "differs"


# Prompt, chosen and rejected of the pairs of a row. Most are longer than the small windows.
PAIRS = ((23, 18, 7), (1, 20, 1), (35, 4, 22))


def share(row: Row, model: nn.Module) -> None:
    """Compare pairs that share their prompts with the same pairs padded: losses and gradients."""
    draw = torch.Generator().manual_seed(6)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [
        {
            name: torch.randint(3, 90, (n,), generator=draw).tolist()
            for name, n in zip(names, lengths, strict=True)
        }
        for lengths in PAIRS
    ]
    loss_fn = prefkern.FusedPreferenceLoss(prefkern.objectives.DPO(beta=0.1))
    reference = torch.linspace(-90, -30, 2 * len(PAIRS))

    def losses(**options: bool) -> Tensor:
        batch = PreferenceCollator(0, **options)(pairs)
        outputs = prefkern.preference_outputs(model, batch, loss_fn, ref_logps=reference)
        return outputs.losses + 0 * outputs.loss

    try:
        shared = losses(padding_free=True, share_prompt=True)
        ours = gradients(model, shared)
    except Exception as error:  # noqa: BLE001
        row.sharing, row.why_not_shared = "refused", reason(error, 400)
        return
    row.sharing = "masked" if reads_whole_row(model, shares=True) else "by paths"
    found = []
    # As in `pack`: the second is a packed row, in which each response has a prompt of its own.
    for options in ({}, {"padding_free": True}):
        expected = losses(**options)
        found.append(errors(shared, expected, ours, gradients(model, expected)))
        if within_bounds(*found[-1]):
            return
    row.why_not_shared = f"{row.sharing}: " + ", ".join(f"{x:.0e} and {y:.0e}" for x, y in found)
    row.sharing = "differs"


def alone(model: nn.Module, ids: Tensor, bounds: Tensor) -> Tensor:
    """Each sequence of a row by itself, (1, M - 1); between two of them stands a 0."""
    parts = [prefkern.token_logprobs(model, part) for part in ids.split(PACKED, 1)]
    return torch.cat([torch.nn.functional.pad(part, (0, 1)) for part in parts], 1)[:, :-1]


def padded(model: nn.Module, ids: Tensor, bounds: Tensor) -> Tensor:
    """The sequences of a row as a padded batch, laid out as by `alone`."""
    mask = torch.arange(max(PACKED)) < bounds.diff()[:, None]
    rows = torch.zeros(mask.shape, dtype=torch.int64)
    rows[mask] = ids[0]
    logps = torch.nn.functional.pad(prefkern.token_logprobs(model, rows, mask.long()), (0, 1))
    return logps[mask][None, :-1]


def measure_class(name: str) -> Row:
    model_class = getattr(transformers, name)

    def made() -> tuple[nn.Module, tuple[Tensor, ...], dict]:
        return build(model_class, OWN.get(name, {})), family_table.batch(), {}

    return measure(Row(name), made)


def measure_family(family: Family, has_image: bool) -> Row:
    def made() -> tuple[nn.Module, tuple[Tensor, ...], dict]:
        model = family_table.build(family)
        if model is None:
            raise ImportError(f"this transformers has no {family.name}")
        ids, mask, labels = family_table.batch()
        inputs = {}
        if has_image:
            ids, labels, inputs = family_table.with_image(family, ids, labels)
        return model, (ids, mask, labels), inputs

    return measure(Row(f"{family}, with an image" if has_image else str(family)), made)


def reason(error: Exception, length: int = 160) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:length]}"


def described(transform: HeadTransform) -> str:
    parts = []
    if transform.logit_scale != 1:
        parts.append(f"scale {transform.logit_scale:g}")
    if transform.softcap is not None:
        parts.append(f"softcap {transform.softcap:g}")
    if transform.vocab_size is not None:
        parts.append(f"the first {transform.vocab_size} entries")
    return ", ".join(parts)


def classes() -> list[str]:
    """Every class of the auto mappings, once."""
    names = [
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    ]
    return list(dict.fromkeys(names))


def page(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    rows = report["classes"]
    by_status = {status: [row for row in rows if row["status"] == status] for status in STATUSES}
    counts = ", ".join(f"{len(found)} {status}" for status, found in by_status.items())
    versions = ", ".join(
        f"{name} {version}" for name, version in report["versions"].items() if version
    )
    packed, shared = (
        ", ".join(f"{number} {way}" for way, number in Counter(ways).most_common() if way)
        for ways in zip(
            *((row["packing"], row["sharing"]) for row in by_status["agrees"]), strict=True
        )
    )
    agreed = sorted(by_status["agrees"], key=lambda row: (not row["transform"], row["model"]))
    lines = [
        HEAD.format(command=report["command"], date=report["date"][:10], versions=versions),
        *_table(("family", *COLUMNS), report["families"]),
        f"\n## Every class of the auto mappings\n\n{len(rows)} classes: {counts}.",
        f"Packed: {packed}. Prompt shared: {shared}.\n",
        *_table(("class", *COLUMNS), agreed),
    ]
    for what, way, why in (
        ("Not packed", "packing", "why_not_packed"),
        ("Without a shared prompt", "sharing", "why_not_shared"),
    ):
        lines += [f"\n### {what}, by the reason\n", "| reason | classes |", "|---|---|"]
        for reason, names in _reasons(agreed, way, why).items():
            lines.append(f"| {reason} | {', '.join(names)} |")
    for status, title in (("differs", "Wrong"), ("refused", "Refused"), ("not run", "Not run")):
        if by_status[status]:
            lines += [f"\n### {title}\n", "| class | why |", "|---|---|"]
            lines += [
                f"| {row['model']} | {row['why'].replace('|', chr(92) + '|')} |"
                for row in by_status[status]
            ]
    return "\n".join(lines) + "\n"


def _reasons(rows: list[dict[str, Any]], way: str, why: str) -> dict[str, list[str]]:
    """The classes that are refused, by what the error says."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row[way] not in ("by paths", "masked", ""):
            text = re.sub("^.*cannot take [a-z ]+: ", "", row[why])
            known = [each for each in REASONS if each in text]
            found.setdefault(known[0] if known else text, []).append(row["model"])
    return found


def _table(columns: Sequence[str], rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        errors = (row["value_error"], row["gradient_error"])
        cells = [row["model"], row["transform"]]
        cells += [row["status"] if error is None else f"{error:.0e}" for error in errors]
        cells += [row["packing"], row["sharing"]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="classes; default: all of them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args(argv)
    # transformers warns a lot about the special tokens of tiny configs.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    families = []
    if not arguments.names:
        families = [measure_family(family, False) for family in (*FAMILIES, *VISION)]
        families += [measure_family(family, True) for family in VISION]
    rows = []
    for name in arguments.names or classes():
        rows.append(measure_class(name))
        print(f"{name:45} {rows[-1].status:8} {rows[-1].why}", flush=True)
    print(dict(Counter(row.status for row in [*families, *rows])))
    command = shlex.join(["python", "bench/families.py", *argv])
    report = environment(torch.device("cpu"), command) | {
        "bounds": BOUNDS,
        "families": [asdict(row) for row in families],
        "classes": [asdict(row) for row in rows],
    }
    if arguments.json:
        # One line for each row.
        text = json.dumps(report).replace('{"model"', '\n{"model"')
        arguments.json.write_text(text + "\n")
    if arguments.page:
        arguments.page.write_text(page(report))
    measured = [*families, *rows]
    found = [(row.status, row.packing, row.sharing) for row in measured]
    return int(any("differs" in each for each in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
