"""Each kind of bad argument to the operator: its own error, before any memory is taken."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import prefkern
from prefkern.measure import Meter


def good() -> dict:
    return {
        "hidden": torch.randn(2, 3, 8),
        "weight": torch.randn(50, 8),
        "labels": torch.randint(50, (2, 3)),
    }


LABELS_OUT_OF_RANGE = [50, -7, 2**40]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [[1.0] * 8]}, TypeError, "hidden must be a tensor"),
        ({"hidden": torch.zeros(2, 3, 8).long()}, TypeError, "hidden must be float32.*int64"),
        (
            {"hidden": torch.randn(2, 3, 8).double()},
            TypeError,
            "hidden is torch.float64.*one dtype",
        ),
        ({"hidden": torch.randn(2, 3, 7)}, ValueError, r"H = 8.*\[2, 3, 7\]"),
        ({"hidden": torch.randn(())}, ValueError, "hidden must have shape"),
        ({"hidden": torch.randn(2, 3, 8).bfloat16()}, TypeError, "one dtype"),
        ({"hidden": torch.randn(2, 3, 8, device="meta")}, ValueError, "meta"),
        ({"weight": None}, TypeError, "weight must be a tensor"),
        ({"weight": torch.randn(50)}, ValueError, r"\[V, H\]"),
        ({"weight": torch.randn(0, 8)}, ValueError, r"\[V, H\]"),
        ({"weight": torch.randn(50, 8).double()}, TypeError, "weight torch.float64;.*one dtype"),
        ({"bias": torch.randn(50).double()}, TypeError, "bias must be torch.float32"),
        ({"bias": torch.randn(8)}, ValueError, r"bias must have shape \[V\] = \[50\]"),
        ({"bias": torch.randn(50).bfloat16()}, TypeError, "bias must be"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor"),
        ({"labels": torch.randint(50, (2, 3)).int()}, TypeError, "int64, got torch.int32"),
        ({"labels": [[0, 0, 0]] * 2}, TypeError, "labels must be"),
        ({"labels": torch.randint(50, (3, 2))}, ValueError, r"\[2, 3\], got \[3, 2\]"),
        *(
            (
                {"labels": torch.tensor([[0, 1, bad], [2, 3, -100]])},
                ValueError,
                rf"\[0, 50\).*{bad}",
            )
            for bad in LABELS_OUT_OF_RANGE
        ),
        ({"ignore_index": "pad"}, TypeError, "ignore_index"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"temperature": torch.ones(1)}, TypeError, "temperature"),
        ({"softcap": 0.0}, ValueError, "softcap must be > 0"),
        ({"softcap": -30.0}, ValueError, "softcap"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale"),
        ({"logit_scale": None}, TypeError, "logit_scale"),
        ({"workspace_mb": 0}, ValueError, "workspace_mb must be > 0"),
        ({"workspace_mb": -5}, ValueError, "workspace_mb"),
        ({"workspace_mb": "64"}, TypeError, "workspace_mb"),
        ({"backend": "cuda"}, ValueError, "'triton', 'torch'"),
    ],
)
def test_bad_argument(change, error, message):
    arguments = {**good(), **change}
    with Meter() as meter, pytest.raises(error, match=message):
        prefkern.linear_logprobs(**arguments)
    # The labels' range is the one check that looks at values: it holds some masks of their size.
    assert meter.peak_bytes <= 1024


@pytest.mark.parametrize("bad", LABELS_OUT_OF_RANGE)
def test_the_oracle_refuses_labels_too(bad):
    arguments = good()
    arguments["labels"][0, 0] = bad
    with pytest.raises(ValueError, match="labels"):
        prefkern.reference.linear_logprobs(**arguments)


def test_triton_without_a_gpu_says_what_it_needs():
    """In a process without the interpreter; on a GPU machine the operands are on the CPU."""
    code = """if 1:
        import torch, prefkern
        try:
            prefkern.linear_logprobs(
                torch.randn(3, 8), torch.randn(50, 8), torch.zeros(3).long(), backend="triton"
            )
        except RuntimeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment_without_interpreter(),
    )
    assert "triton" in done.stdout and (
        "needs a GPU" in done.stdout or "not installed" in done.stdout
    )


def environment_without_interpreter() -> dict[str, str]:
    import os
    from pathlib import Path

    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    return environment


def test_float64_is_the_torch_backends(device):
    """It computes in float64 what it is given in it; the kernels do not, and say so."""
    arguments = [torch.randn(3, 8), torch.randn(50, 8), torch.tensor([1, 2, 3])]
    hidden, weight, labels = (x.to(device) for x in arguments)
    hidden, weight = hidden.double(), weight.double()
    assert prefkern.linear_logprobs(hidden, weight, labels).dtype == torch.float64
    plan = prefkern.last_plan()
    assert plan is not None and plan.backend == "torch"
    with pytest.raises(TypeError, match="hidden is float64.*backend='torch'"):
        prefkern.linear_logprobs(hidden, weight, labels, backend="triton")
    with torch.autocast(device, torch.bfloat16):
        # Which leaves float64 alone, as it does in a linear layer.
        assert prefkern.linear_logprobs(hidden, weight, labels).dtype == torch.float64
        with pytest.raises(TypeError, match="one dtype"):
            prefkern.linear_logprobs(hidden, weight.float(), labels)
    with pytest.raises(TypeError, match="lora_weight is float64"):
        prefkern.linear_logprobs(
            hidden.float(), weight.float(), labels, lora_hidden=hidden[:, :2].float(),
            lora_weight=weight[:, :2],
        )  # fmt: skip
    with pytest.raises(TypeError, match="divergence is of two distributions in float64"):
        prefkern.linear_kl(hidden, weight, labels, hidden.float(), weight.float())
