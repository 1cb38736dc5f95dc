"""Tries the prefkern that this interpreter has installed: `make dist`, in a fresh environment.

    python -P tests/installed.py          # without extras: commands, help, a loss
    python -P tests/installed.py train    # with the extra "train": a run, and its adapter

It imports nothing of the source tree, and runs the commands as a user's shell does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

import prefkern
import prefkern_kernels

PLACES = [Path(sys.prefix), Path(prefkern.__file__), Path(prefkern_kernels.__file__)]


def main(argv: list[str]) -> None:
    """Raises AssertionError for what is not as it should be."""
    assert all(place.is_relative_to(sys.prefix) for place in PLACES), PLACES
    version = metadata.version("prefkern")
    assert prefkern.__version__ == version
    assert command("--version") == f"prefkern {version}\n"
    if argv == ["train"]:
        a_run()
    else:
        facts = command("env")
        print(facts, end="")
        assert f"prefkern           {version}\n" in facts
        for name in ("train", "margins"):
            assert "--learning_rate" in command(name, "--help")
        said = command("train", "--model", "m", "--dataset", "d", status=2)
        assert said.endswith(" not installed: pip install 'prefkern[train]'\n"), said
        a_loss()
    print(
        f"prefkern {version}, as installed: {' '.join(argv) or 'without extras'}: as it should be"
    )


def command(*argv: str, status: int = 0) -> str:
    """What a command prints; on stderr, where it is to fail."""
    done = subprocess.run(
        [Path(sys.executable).with_name("prefkern"), *argv],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def a_loss() -> None:
    """Stable AdaDPO and its gradients, beside the same with logits in memory."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6, 16), torch.randn(101, 16) / 4
    labels, ref_logps = torch.randint(101, (4, 6)), torch.full((4,), -20.0)
    objective = prefkern.objectives.build("adadpo")
    leaves = [[x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2)]
    loss_fn = prefkern.FusedPreferenceLoss(objective)
    losses = (
        loss_fn(*leaves[0], labels, ref_logps=ref_logps).loss,
        prefkern.reference.preference_loss(objective, *leaves[1], labels, ref_logps=ref_logps).loss,
    )
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1])
    for ours, theirs in zip(*leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert ours.grad.abs().max() > 0


def a_run() -> None:
    """From pairs to an adapter, on a model of two tiny layers."""
    from peft import PeftModel
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    texts = ["<unk>", "<eos>", "say", "a", "word", "yes", "no"]
    tokenizer = Tokenizer(WordLevel({text: n for n, text in enumerate(texts)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(texts)}
    with tempfile.TemporaryDirectory() as folder:
        model, pairs, out = (str(Path(folder, name)) for name in ("model", "pairs.jsonl", "out"))
        AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(model)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(
            model
        )
        pair = {"prompt": "say a word", "chosen": "yes", "rejected": "no"}
        Path(pairs).write_text(f"{json.dumps(pair)}\n" * 8)
        options = ("--lora_r", "4", "--max_steps", "2", "--use_cpu", "--report_to", "none")
        files = ("--model", model, "--dataset", pairs, "--output_dir", out)
        print(command("train", *files, *options, "--learning_rate", "1e-2"), end="")
        base = AutoModelForCausalLM.from_pretrained(model)
        trained = PeftModel.from_pretrained(base, out).named_parameters()
        assert any(x.abs().max() > 0 for name, x in trained if "lora_B" in name)


if __name__ == "__main__":
    main(sys.argv[1:])
