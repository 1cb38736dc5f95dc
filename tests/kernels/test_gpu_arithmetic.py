"""The kernels' tests with a GPU's exponential and quotient in the interpreter (`gpu_arithmetic`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.machine import HAS_GPU
from support.processes import ROOT, environment

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(HAS_GPU, reason="a GPU has its own arithmetic")

TESTS = (
    *("tests/kernels/test_kernels.py", "tests/kernels/test_product_fold.py"),
    *("tests/kernels/test_pair_kernel.py", "tests/kernels/test_guards.py"),
)
CODE = """
import numpy as np, torch, triton, triton.language as tl
from support import gpu_arithmetic as gpu
@triton.jit
def kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    v = tl.load(x + at)
    tl.store(y + at, tl.exp(v))
    tl.store(y + N + at, v / 3.0)
    tl.store(y + 2 * N + at, tl.div_rn(v, tl.full((N,), 3.0, tl.float32)))
x = torch.linspace(-80, 80, 1024)
y, again = torch.empty(2, 3, 1024)
kernel[(1,)](x, y, N=1024)
kernel[(1,)](x, again, N=1024)
assert torch.equal(y, again)
true = torch.stack([x.double().exp(), x.double() / 3, x.double() / 3])
print(*((y - true).abs() / true.abs()).amax(1).tolist(), gpu.exp(np.float32([0.0]))[0],
      gpu.quotient(np.float32([3.0]), np.float32([0.5]))[0])
"""


def test_it_has_the_errors_of_a_gpu(tmp_path: Path) -> None:
    """Those of an exponential grow with its argument; what is exact there is exact."""
    script = tmp_path / "script.py"
    script.write_text(CODE)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(interprets=True), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    of_exp, of_quotient, of_precise, one, six = map(float, done.stdout.split())
    ulp = float(np.finfo(np.float32).eps)
    assert 1e-6 < of_exp < 80 * ulp and ulp / 2 < of_quotient < 2 * ulp
    assert of_precise <= ulp / 2 and (one, six) == (1.0, 6.0)


@pytest.mark.long
def test_the_tests_pass_with_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "support.gpu_arithmetic", *TESTS],
        cwd=ROOT, env=environment(interprets=True), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
