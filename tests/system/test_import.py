"""`import prefkern`: quick, and without triton, transformers or any extra."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

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
    assert "training needs more packages than the operator does (" in out
    assert out.endswith(": pip install 'prefkern[train]'\n")


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


def test_help_needs_nothing_but_the_standard_library_and_a_run_says_what_is_missing() -> None:
    """As in an environment without the extras, and in one without transformers too."""
    extras = ("accelerate", "datasets", "peft", "yaml", "xxhash")
    for absent in (extras, (*extras, "transformers", "torch", "rich")):
        out = run(f"""if 1:
            import sys
            for name in {absent!r}:
                sys.modules[name] = None
            from contextlib import redirect_stderr
            from prefkern.cli.__main__ import main
            for command, files in (("train", ["--dataset", "d"]), ("margins", ["--output", "o"])):
                try:
                    main([command, "--help"])
                except SystemExit as exit_:
                    print(command, "help:", exit_.code)
                with redirect_stderr(sys.stdout):
                    print(main([command, "--model", "m", "--dataset", "d", *files]))
                    print(main([command, "--no_such_option"]))
        """)
        for command in ("train", "margins"):
            assert f"usage: prefkern {command} [CONFIG.yaml]" in out
            assert f"{command} help: 0\n" in out
            missing = "accelerate, datasets, peft not installed: pip install 'prefkern[train]'"
            assert f"prefkern {command}: error: {missing}\n2\n" in out
            assert f"prefkern {command}: error: unknown argument '--no_such_option'" in out
        assert "--lora_r" in out and "--objective" in out and "--output_dir" in out
        has_transformers = "transformers" not in absent
        assert ("--learning_rate" in out) and ("--adam_beta1" in out) == has_transformers


def test_the_line_that_installs_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name where prefkern is installed; a tree that is only on the path, by its folder."""
    from prefkern import version

    monkeypatch.setattr(version, "VERSION", "0.1.0")
    assert version.install_line("train") == "pip install 'prefkern[train]'"
    monkeypatch.setattr(version, "VERSION", "unknown")
    root = Path(version.__file__).parent.parent
    assert version.install_line("bench") == f"pip install '{root}[bench]'"
    assert (root / "prefkern").is_dir()


def test_no_error_names_an_install_line_of_its_own() -> None:
    """`install_line` knows where prefkern is; other packages are named as an index has them."""
    root = Path(__file__).parent.parent.parent
    for file in (*root.glob("prefkern/**/*.py"), *root.glob("bench/prefkern_bench/**/*.py")):
        if file.name != "version.py":
            assert not re.search(r"pip install ['\"]*(prefkern|\.)", file.read_text()), file
