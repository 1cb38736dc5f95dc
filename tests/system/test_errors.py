"""Each row of the error catalogue gives its own error, before any memory is taken; none is missing.

Two tests keep the catalogue complete: every parameter of a call in it has a row, and a row reaches
every `raise` in the package, or another test has its message.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import json
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

import prefkern
from prefkern_bench.measure import Meter
from support import error_catalogue as catalogue
from support import tiny
from support.error_catalogue import CALLS, LABELS_OUT_OF_RANGE, ROWS, Row, operator
from support.processes import environment

ROOT = Path(__file__).parent.parent.parent
# Calls that run nothing before they have looked at everything.
CHEAP = ("linear_logprobs", "linear_kl", "loss", "plan_for", "Pairs", "reference.linear_logprobs")


@functools.cache
def error_of(row: Row) -> Exception | None:
    call = CALLS[row.call]
    arguments = {**call.good(), **row.change}
    try:
        call.function(**arguments)
    except Exception as error:  # noqa: BLE001
        return error
    return None


@pytest.mark.parametrize("number", range(len(ROWS)), ids=lambda number: str(ROWS[number]))
def test_bad_argument(number):
    row = ROWS[number]
    error = error_of(row)
    assert type(error) is row.error, error
    message = str(error)
    for part in row.says:
        assert part in message
    if (row.call, row.argument) not in catalogue.SAID_OTHERWISE:
        assert re.search(rf"\b{row.argument}\b", message), message
    # A line or two that can be read, and not a tensor printed.
    assert len(message) < 500


@pytest.mark.parametrize("call", CHEAP)
def test_nothing_is_allocated_before_the_error(call):
    """Except for the range of the labels, which needs some masks of their size."""
    torch.manual_seed(0)
    for row in ROWS:
        if row.call != call:
            continue
        arguments = {**CALLS[call].good(), **row.change}
        with Meter() as meter, pytest.raises(row.error):
            CALLS[call].function(**arguments)
        assert meter.peak_bytes <= 1024, row


# A call of these that is right takes more than their errors need.
NEVER_RIGHT = ("gradient_balance", "loss of tdpo1", "loss of madpo", "oracle of madpo")
RIGHT = [each for each in CALLS if each not in NEVER_RIGHT and "without a formula" not in each]


@pytest.mark.parametrize("call", RIGHT)
def test_what_is_right_is_taken(call):
    CALLS[call].function(**CALLS[call].good())


# "loss of kto" has rows beside those of "loss".
@pytest.mark.parametrize("call", [each for each in CALLS if " of " not in each])
def test_every_parameter_has_a_row(call):
    function = CALLS[call].function
    function = function.forward if isinstance(function, torch.nn.Module) else function
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = {
        name for name, each in inspect.signature(function).parameters.items()
        if each.kind not in kinds
    }  # fmt: skip
    tried = {name for row in ROWS if row.call == call for name in row.change}
    missing = names - tried - set(CALLS[call].any_value)
    assert not missing


def raise_sites() -> dict[tuple[str, int], ast.Raise]:
    """Every `raise` of the packages by file and line, except those that re-raise."""
    sites = {}
    packages = (ROOT / "prefkern", ROOT / "bench/prefkern_bench")
    for path in sorted(path for package in packages for path in package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                sites[str(path.relative_to(ROOT)), node.lineno] = node
    return sites


def reached(error: BaseException | None) -> set[tuple[str, int]]:
    """The lines of the package that raised an error and its causes."""
    lines = set()
    while error is not None:
        for frame in traceback.extract_tb(error.__traceback__):
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and frame.lineno is not None:
                lines.add((str(path.relative_to(ROOT)), frame.lineno))
        error = error.__cause__ or error.__context__
    return lines


def phrases(node: ast.Raise) -> set[str]:
    """Runs of three words in a message, or of two if there are no three."""
    texts = [
        re.findall(r"[\w'-]+", each.value)
        for each in ast.walk(node)
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    ]
    for size in (3, 2):
        found = {
            " ".join(words[at : at + size])
            for words in texts
            for at in range(len(words) - size + 1)
        }
        if found:
            return found
    return set()


# Sites whose message has no three words of its own in a row: by what the source says there, and the
# test that reaches it, by what that has of the message.
ELSEWHERE = {
    ("prefkern/__init__.py", "module 'prefkern' has no attribute"): ("test_errors", "no attribute"),
    ("prefkern/training/checkpoint_files.py", "{found}; {remedy}"): (
        "test_corrupt",
        "start anew, without it",
    ),
    ("prefkern/training/checkpoints.py", "_of_another_model("): (
        "test_corrupt",
        "is of another model",
    ),
    ("prefkern/training/checkpoints.py", "CheckpointError(wrong)"): (
        "test_fsdp",
        "was saved with fsdp_state_dict_type",
    ),
    ("prefkern/training/checkpoint_files.py", "_first_line(error)"): (
        "test_corrupt",
        "it would call",
    ),
    ("prefkern/training/checkpoints.py", "{config}: {name} is"): (
        "test_corrupt",
        "lora_alpha is 8 there",
    ),
    ("prefkern/cli/arguments.py", "ValueError(message)"): (
        "test_cli_train",
        "invalid float value",
    ),
    ("prefkern/cli/arguments.py", "{what} {error}"): ("test_options", "objective_options' is not"),
    ("prefkern/cli/arguments.py", "'; '.join(unknown)"): ("test_trl_options", "option 'env': set"),
    ("prefkern/cli/options_file.py", "error.msg"): ("test_options", "Expecting ':' delimiter"),
    ("prefkern/cli/before_training.py", "--report_to"): ("test_before_training", "--report_to wan"),
    ("prefkern/cli/plan_options.py", "ValueError(message)"): ("test_cli_plan", "invalid int value"),
    ("prefkern/cli/data.py", "ValueError(message)"): ("test_cli_data", "invalid choice: 'middle'"),
    ("prefkern/training/item_trainer.py", "unreached("): ("test_frozen", "such as unused"),
    ("prefkern/training/trainable.py", "unreached("): (
        "test_frozen",
        "active adapter is 'default'",
    ),
    ("prefkern/training/checkpoints.py", "CheckpointError(problem)"): (
        "test_fsdp_files",
        "or set save_strategy='no'",
    ),
    ("prefkern/cli/plan.py", "unusable_config("): ("test_cli_plan", "no model can be built"),
    ("prefkern/models/loading.py", "unusable_config("): ("test_cli_plan", "no model can be built"),
    ("prefkern/cli/options_file.py", "this is not YAML"): ("test_cli_train", "expected ','"),
    ("prefkern/training/options.py", "ValueError(str(error))"): (
        "test_trainer_objectives",
        "has no option",
    ),
    ("prefkern/data/loading.py", "the file is empty"): ("test_data", "empty|cannot be loaded"),
    ("prefkern/data/tokenisation.py", "no {what}"): ("test_data", "row 1: no {what}"),
    ("prefkern/data/tokenisation.py", "row {row}: {error}"): ("test_data", "row 1: 'chosen' must"),
    ("prefkern/integrations/trl/head.py", "was replaced by"): ("test_trl", "forward was replaced"),
    ("prefkern/integrations/trl/options.py", "which {why}"): ("test_trl", "loss_weights"),
    ("prefkern/ops/memory.py", "self._report("): ("test_memory", "out of memory in the"),
    ("prefkern/loss/nonfinite.py", "Error(message)"): (
        "test_nonfinite",
        "scored tokens, the first is",
    ),
    ("prefkern/models/head_forward.py", "uncalled(base, head)"): (
        "test_errors",
        "did not call its output",
    ),
    ("prefkern/models/score_head.py", "uncalled(base, head)"): (
        "test_reward_packing",
        "did not call its output",
    ),
    ("prefkern/models/transform.py", "uncalled(base, head)"): (
        "test_errors",
        "did not call its output",
    ),
    ("prefkern/ops/once.py", "differentiated once"): ("test_kl", "differentiated once"),
    ("prefkern/models/packing.py", "_refusal(base, problem, shares)"): (
        "test_packing",
        "cannot take packed",
    ),
    ("prefkern/loss/pairwise.py", "needs ref_logps, got None"): (
        "test_errors",
        "needs {what}, got None",
    ),
    ("prefkern/models/routers.py", "returned none"): ("test_routers", "returned none"),
}


def text_of(test: Path) -> str:
    """The text of a file of tests, without the pointers above, which are not tests."""
    return re.sub(r"(?s)ELSEWHERE = \{.*?\n\}", "", test.read_text())


def test_every_raise_is_reached_or_tested():
    sites = raise_sites()
    lines = set().union(*(reached(error_of(row)) for row in ROWS))
    tests = "".join(text_of(path) for path in (ROOT / "tests").rglob("test_*.py"))
    # As a test writes a message: without the escapes of a pattern, and over lines.
    tests = " ".join(re.findall(r"[\w'-]+", re.sub(r"\\(.)", r"\1", tests)))
    missing = []
    for (path, line), node in sites.items():
        last = node.end_lineno or line
        if any((path, at) in lines for at in range(line, last + 1)):
            continue
        if any(phrase in tests for phrase in phrases(node)):
            continue
        source = ast.unparse(node)
        pointers = [to for (file, part), to in ELSEWHERE.items() if path == file and part in source]
        if any(
            words in text_of(next((ROOT / "tests").rglob(f"{test}.py"))) for test, words in pointers
        ):
            continue
        missing.append(f"{path}:{line}: {source[:160]}")
    assert not missing, "\n".join(missing)


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(prefkern.ops.call, "_kernels", lambda: None)
    with pytest.raises(RuntimeError, match="'triton' was asked for, but triton is not installed"):
        prefkern.linear_logprobs(**operator(), backend="triton")


def test_what_is_not_there():
    with pytest.raises(AttributeError, match="'prefkern' has no attribute 'linear_logprops'"):
        _ = prefkern.linear_logprops  # pyright: ignore[reportAttributeAccessIssue]


def test_heads_that_are_not_called_once():
    class Twice(type(catalogue.MODEL)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            self.lm_head(out.logits.new_zeros(1, 3, 32))
            return out

    class Never(type(catalogue.MODEL)):
        def forward(self, *args, **kwargs):
            states = self.model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
            return CausalLMOutput(logits=states @ self.lm_head.weight.T)

    for kind, message in (
        (Twice, "Twice calls its output head more than once"),
        (Never, "Never did not call its output head"),
    ):
        model = copy.deepcopy(catalogue.MODEL)
        model.__class__ = kind
        with pytest.raises(RuntimeError, match=message):
            prefkern.token_logprobs(model, catalogue.TEXT)


def test_the_kernel_takes_no_missing_reference_for_one():
    from prefkern.loss import pairwise

    scores = pairwise.Scores(torch.zeros(2), torch.tensor([0, 1, 2]))
    for objective, what in ((prefkern.objectives.DPO(), "ref_logps"),):
        with pytest.raises(ValueError, match=f"DPO needs {what}, got None"):
            pairwise._by_kernel(objective, scores, {})
    scores = pairwise.Scores(torch.zeros(2), torch.tensor([0, 1, 2]), ref_logps=torch.zeros(2))
    with pytest.raises(ValueError, match="MADPO needs reward_margins, got None"):
        pairwise._by_kernel(prefkern.objectives.MADPO(), scores, {})


def test_trainers_that_cannot_be_told_what_to_do(tmp_path):
    pytest.importorskip("peft")
    from prefkern.models.adapters import check_reference_adapter
    from prefkern.training.objective_trainer import ObjectiveTrainer
    from support.training import config

    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an eos token; set pad_token"):
        prefkern.PreferenceTrainer(
            catalogue.MODEL, config(tmp_path), tiny.dataset(4), processing_class=tokenizer
        )
    with pytest.raises(ValueError, match="either ref_adapter_name .'a'. or ref_model, not both"):
        check_reference_adapter(catalogue.MODEL, "a", catalogue.MODEL)
    with pytest.raises(NotImplementedError, match="does not define _preference_outputs"):
        ObjectiveTrainer._preference_outputs(object(), None, {})  # pyright: ignore[reportArgumentType]


def test_reward_models_that_are_none(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    from prefkern.cli import margins
    from prefkern.training import rewards

    tiny.model().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    adapter = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    model, _ = rewards.new_reward_model(str(tmp_path / "base"), adapter)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="holds an adapter .* that transformers loaded or added"):
        rewards.new_reward_model(str(folder), adapter)
    written = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"modules_to_save": None}, "and its base have no weights score.weight"),
        ({"base_model_name_or_path": None}, "does not name its base model"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**written, **change}))
        with pytest.raises(ValueError, match=message):
            rewards.load_reward_model(str(folder))
    monkeypatch.setattr(rewards.score_head, "NAMES", ("another",))
    with pytest.raises(ValueError, match="has no head called another, so peft would not train it"):
        rewards.new_reward_model(str(tmp_path / "base"), adapter)
    monkeypatch.setattr(margins.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="--output: cannot write to"):
        margins._check_output(tmp_path / "margins.jsonl", overwrite=False)


def test_shapes_of_the_benchmark():
    from prefkern_bench import providers, shapes

    with pytest.raises(ValueError, match="x: 7 tokens do not fill 1 pairs"):
        shapes.Shape("x", 1, 7, 8, 50)
    with pytest.raises(NotImplementedError, match="has no softcap"):
        providers._refuse_softcap(30.0)


@pytest.mark.parametrize("bad", LABELS_OUT_OF_RANGE)
def test_the_oracle_refuses_labels_too(bad):
    arguments = operator()
    arguments["labels"][0, 0] = bad
    with pytest.raises(ValueError, match="labels"):
        prefkern.reference.linear_logprobs(**arguments)


def test_triton_without_a_gpu_says_what_it_needs():
    """In a process without the interpreter; also on a GPU machine the operands are on the CPU."""
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
        env=environment(interprets=False),
    )
    assert "triton" in done.stdout and (
        "needs a GPU" in done.stdout or "not installed" in done.stdout
    )


def test_float64_is_the_torch_backends(device):
    """It computes float64 inputs in float64; the kernels refuse them with an error."""
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
    with pytest.raises(TypeError, match="divergence needs both distributions in float64"):
        prefkern.linear_kl(hidden, weight, labels, hidden.float(), weight.float())
