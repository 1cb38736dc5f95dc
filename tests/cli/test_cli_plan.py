"""`prefkern plan`: its numbers against `plan_for`, and against the bytes and products of real steps."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import prefkern
from prefkern.cli import __main__ as cli
from prefkern.cli import plan
from prefkern_bench.measure import Meter
from support import tiny

MIB = 2**20
CONFIGS = {
    "Llama": ({"tie_word_embeddings": False}, (32, 97, False, 1.0, None)),
    "Gemma2": ({"final_logit_softcapping": 5.0}, (32, 97, True, 1.0, 5.0)),
    "Cohere": ({"logit_scale": 0.0625}, (32, 97, True, 0.0625, None)),
    "Granite": ({"logits_scaling": 8.0}, (32, 97, False, 0.125, None)),
    "GPT2": ({}, (32, 97, True, 1.0, None)),
}


def _saved(config, path) -> str:
    """A folder with a configuration and nothing else: there are no weights to load."""
    config.save_pretrained(path)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    return str(path)


@pytest.mark.parametrize("family", CONFIGS)
def test_head_of_a_family(tmp_path, family):
    options, expected = CONFIGS[family]
    found = plan.head_of(plan.empty_model(_saved(tiny.model(family, **options).config, tmp_path)))
    assert (
        found.hidden_size,
        found.vocab_size,
        found.is_tied,
        found.logit_scale,
        found.softcap,
    ) == expected


@pytest.mark.parametrize("family", ["Gemma3", "Llava"])
def test_head_of_a_vision_language_model(tmp_path, family):
    """One that is a causal LM to transformers, and one that is not; sizes are the text model's."""
    text = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    options = {}
    if family == "Gemma3":
        text |= {"model_type": "gemma3_text", "final_logit_softcapping": 9.0}
        vision |= {"model_type": "siglip_vision_model"}
    else:
        text |= {"model_type": "llama"}
        vision |= {"model_type": "clip_vision_model", "projection_dim": 16}
        options["image_token_id"] = 100
    kind = getattr(transformers, f"{family}Config")
    config = kind(text_config=text, vision_config=vision, **options)
    found = plan.head_of(plan.empty_model(_saved(config, tmp_path)))
    assert (found.hidden_size, found.vocab_size) == (32, 101)
    assert found.softcap == (9.0 if family == "Gemma3" else None)


HEAD = plan.ModelHead("Tiny", 64, 4000, False, 1.0, None)
BATCH = plan.Batch.of_lengths(pairs=2, length=48, prompt_length=16)


def test_rows_are_what_plan_for_says():
    head = plan.ModelHead("Tiny", 64, 4000, False, 1.0, 30.0)
    # On a CPU float16 is the same for every processor; bfloat16 is not.
    costs = plan.fused_costs(head, BATCH, torch.float16, "cpu", [1.0, 0.5])
    assert [(cost.task, cost.way, cost.workspace_mb) for cost in costs] == [
        ("reference", "forward", 0.5),
        ("frozen head", "one_pass", 0.5),
        ("trained head", "two_pass", 0.5),
        ("trained head", "two_pass", 1.0),
        ("trained head", "one_pass", 4.0),
    ]
    for cost in costs:
        expected = prefkern.plan_for(
            2 * 2 * 32,
            64,
            4000,
            dtype=torch.float16,
            device="cpu",
            trains_hidden=cost.task != "reference",
            trains_head=cost.task == "trained head",
            softcap=True,
            return_stats=cost.task != "reference",
            workspace_mb=cost.workspace_mb,
        )
        assert cost.way == expected.structure
        assert cost.temporary_bytes == expected.workspace_bytes
        assert cost.saved_bytes == expected.saved_bytes
        assert cost.operations == expected.operations
    # A GPU need not be here.
    on_gpu = plan.fused_costs(head, BATCH, torch.bfloat16, "cuda", [1.0])
    assert on_gpu[0].bytes < 1.001 * MIB


def _inputs(dtype: torch.dtype, trains_hidden: bool, trains_head: bool):
    hidden = torch.randn(BATCH.positions, HEAD.hidden_size).to(dtype).requires_grad_(trains_hidden)
    weight = torch.randn(HEAD.vocab_size, HEAD.hidden_size).to(dtype).requires_grad_(trains_head)
    labels = torch.randint(HEAD.vocab_size, (BATCH.positions,))
    return hidden, weight, labels


def _gradients(*tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_and_operations_of_real_calls(dtype):
    for cost in plan.fused_costs(HEAD, BATCH, dtype, "cpu", [0.5]):
        trains_hidden, trains_head = cost.task != "reference", cost.task == "trained head"
        hidden, weight, labels = _inputs(dtype, trains_hidden, trains_head)
        labels[: BATCH.positions - BATCH.scored] = -100
        with Meter() as meter:
            scores = prefkern.linear_logprobs(
                hidden,
                weight,
                labels,
                workspace_mb=cost.workspace_mb,
                return_stats=trains_hidden,
                backend="torch",
            )
            if trains_hidden:
                scores.logps.sum().backward()
        assert prefkern.last_plan().structure == cost.way
        assert meter.operations == cost.operations
        # The results, a few numbers a position.
        results = 64 * BATCH.positions
        measured = meter.peak_bytes - _gradients(hidden, weight)
        assert 0.3 * cost.bytes < measured <= cost.bytes + results, cost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_and_operations_of_logits_in_memory(dtype):
    for cost in plan.eager_costs(HEAD, BATCH, dtype):
        hidden, weight, labels = _inputs(
            dtype, cost.task != "reference", cost.task == "trained head"
        )
        with Meter() as meter:
            logits = torch.nn.functional.linear(hidden, weight)
            logps = logits.float().log_softmax(-1).gather(-1, labels[:, None])
            if cost.task != "reference":
                logps.sum().backward()
        assert meter.operations == cost.operations
        assert cost.bytes <= meter.peak_bytes <= 1.01 * cost.bytes, cost


def _run(argv: list[str], capsys) -> tuple[int, str, str]:
    status = cli.main(["plan", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_what_is_printed(tmp_path, capsys):
    # The name is as long as a path can be, and has what the printing library reads as markup.
    folder = _saved(tiny.model("Gemma2").config, tmp_path / ("long-" * 20) / "[red]")
    shape = ["--seq-len", "512", "--batch", "4", "--device", "cpu"]
    status, out, _ = _run([folder, *shape, "--workspace-mb", "0.5"], capsys)
    assert status == 0
    assert f"{folder} (Gemma2ForCausalLM): H = 32, V = 97, head tied to the embeddings" in out
    assert "softcap 30" in out and "N = 4,096 scored of 4,096" in out
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines if "logits" in line] == ["reference", "frozen", "trained"]
    trained = [line for line in lines if line[:2] == ["trained", "head"]]
    assert [line[2] for line in trained] == ["two_pass", "one_pass", "logits"]
    logits = 4096 * 97
    assert trained[-1][-3:] == [f"{14 * logits / MIB:.1f}", "MiB", "6.00"]
    # Prompts are not scored, but logits are computed there, too.
    _, out, _ = _run([folder, *shape, "--prompt-len", "256", "--lora"], capsys)
    lines = [line.split() for line in out.splitlines()]
    assert "trained head" not in out.split("NHV")[1]
    assert [line[-1] for line in lines if line[:1] == ["frozen"]] == ["4.00", "8.00"]
    _, out, _ = _run([folder, *shape, "--trains-head"], capsys)
    assert "frozen head" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere/at all", "--seq-len", "8", "--batch", "1"], "nowhere/at all"),
        (["{t5}", "--seq-len", "8", "--batch", "1"], "is not a causal LM: its model type is 't5'"),
        (["{model}", "--seq-len", "8"], "the following arguments are required: --batch"),
        (["{model}", "--batch", "8"], "give the lengths: --data FILE, or --seq-len"),
        (
            ["{model}", "--seq-len", "8", "--batch", "1", "--max_length", "9"],
            "--max-length has no effect without --data",
        ),
        (["{model}", "--seq-len", "one", "--batch", "1"], "--seq-len: invalid int value: 'one'"),
        (["{model}", "--seq-len", "1", "--batch", "1"], "--seq-len must be at least 2, got 1"),
        (["{model}", "--seq-len", "8", "--batch", "0"], "--batch must be at least 1, got 0"),
        (
            ["{model}", "--seq-len", "8", "--batch", "1", "--prompt-len", "8"],
            "--prompt-len must be below --seq-len (8), got 8",
        ),
        (
            ["{model}", "--seq-len", "8", "--batch", "1", "--workspace-mb", "-1"],
            "workspace_mb must be > 0",
        ),
        (["{model}", "--seq-len", "8", "--batch", "1", "--dtype", "int8"], "--dtype: invalid"),
        (["{model}", "--seq-len", "8", "--batch", "1", "--device", "gpu"], "gpu"),
        (
            ["{model}", "--seq-len", "8", "--batch", "1", "--lora", "--trains-head"],
            "--trains-head: not allowed with argument --lora",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, argv, message):
    tiny.model().config.save_pretrained(tmp_path / "model")
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    folders = {"model": tmp_path / "model", "t5": tmp_path / "t5"}
    status, out, err = _run([word.format(**folders) for word in argv], capsys)
    assert status == 2 and not out
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("prefkern plan: error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": "97"},
        {"vocab_size": None},
        {"vocab_size": 0},
        {"num_hidden_layers": "two"},
        {"num_attention_heads": 5},
        {"hidden_size": -32},
        {"dtype": "foo"},
    ],
    ids=str,
)
def test_a_configuration_of_no_model_is_one_line(tmp_path, capsys, change):
    tiny.model().config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    status, out, err = _run([str(tmp_path), "--seq-len", "8", "--batch", "1"], capsys)
    assert status == 2 and not out
    (line,) = [each for each in err.splitlines() if not each.startswith("[transformers]")]
    assert f"model '{tmp_path}': no model can be built from its config.json (" in line
