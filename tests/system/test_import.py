"""`import prefkern`: quick, and without triton, transformers or any extra."""

from __future__ import annotations

import subprocess
import sys

from support.processes import environment


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment(interprets=False),
    ).stdout


def test_without_triton_and_extras():
    out = run("""if 1:
        import sys
        blocked = ("triton", "transformers", "accelerate", "datasets", "peft", "trl", "rich",
                   "liger_kernel", "cut_cross_entropy", "matplotlib", "yaml")
        for name in blocked:
            sys.modules[name] = None
        import torch, prefkern
        hidden = torch.randn(4, 3, 8, requires_grad=True)
        out = prefkern.FusedPreferenceLoss(prefkern.objectives.build("adadpo"))(
            hidden, torch.randn(50, 8), torch.zeros(4, 3).long(), ref_logps=torch.zeros(4)
        )
        out.loss.backward()
        print(out.plan.backend, hidden.grad.isfinite().all().item())
    """)
    assert out.split() == ["torch", "True"]


def test_import_is_quick_and_lazy():
    """Beyond torch: under a second, and neither transformers nor triton loaded."""
    seconds, *loaded = run("""if 1:
        import sys, time, torch
        before = set(sys.modules)
        start = time.perf_counter()
        import prefkern
        print(time.perf_counter() - start)
        print(*(name for name in ("transformers", "triton", "rich", "datasets")
                if name in sys.modules and name not in before))
    """).split()
    assert float(seconds) < 1.0
    assert loaded == []


def test_arguments_of_training_need_no_extra():
    """So that `prefkern train` can say what to install."""
    out = run("""if 1:
        import sys
        for name in ("accelerate", "datasets", "peft", "trl"):
            sys.modules[name] = None
        import prefkern.cli.train
        try:
            import prefkern.training.trainer
        except ImportError as error:
            print(error)
    """)
    assert "pip install 'prefkern[train]'" in out


def test_public_names():
    import prefkern

    for name in prefkern.__all__:
        assert getattr(prefkern, name) is not None, name
    assert set(prefkern.__all__) <= set(dir(prefkern))
