"""`import prefkern`: quick, and without triton, transformers or any extra."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

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
    """They import without extras, so that `prefkern train` can say what to install."""
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


# Where names were, what users import from there, and where they are.
OLD = [
    ("collate", "PreferenceCollator ExampleCollator first_sequence sequence_count", "data.collate"),
    (
        "preparation",
        (
            "adapt base_parameters check_no_native_adapter check_reference_adapter "
            "check_unmerged disable_dropout is_peft_model is_trained_adapter with_own_rates"
        ),
        "models.adapters",
    ),
    ("preparation", "adapter_in_use", "models.own_reference"),
    ("models", "IGNORE_INDEX align_labels preference_outputs token_logprobs", "models.scoring"),
    ("models", "HeadTransform candidate_transforms head_transform", "models.transform"),
    ("models", "forward_with_head head_forward", "models.head_forward"),
    ("models", "HeadInputs find_head unwrap", "models.heads"),
    (
        "diagnostics",
        "GradientBalance explain_nonfinite gradient_balance objective_balance",
        "loss.diagnostics",
    ),
]


@pytest.mark.parametrize(("old", "names", "new"), OLD, ids=[new for _, _, new in OLD])
def test_old_places_still_have_their_names(old: str, names: str, new: str) -> None:
    for name in names.split():
        was = getattr(importlib.import_module(f"prefkern.{old}"), name)
        assert was is getattr(importlib.import_module(f"prefkern.{new}"), name), name


def test_data_without_datasets() -> None:
    """Functions without datasets work; the names that need them say what to install."""
    out = run("""if 1:
        import sys
        sys.modules["datasets"] = None
        import prefkern.data
        print(prefkern.data.truncate([1, 2], [3], [4], 2, None)[0])
        for name in prefkern.data._LAZY:
            assert name in prefkern.data.__all__ and name in dir(prefkern.data), name
            try:
                getattr(prefkern.data, name)
            except ImportError as error:
                print(name, error)
    """)
    kept, *said = out.splitlines()
    assert kept == "[2]"
    assert {line.split()[0] for line in said} >= {"load_preference_dataset", "tokenize_preferences"}
    assert all(line.endswith("(datasets): pip install 'prefkern[train]'") for line in said)
