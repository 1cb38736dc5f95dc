"""Reads model cards, and runs their quick start."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path

import torch
from huggingface_hub import ModelCard


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def options(text: str) -> dict[str, str]:
    """The rows of the card's table of hyper-parameters."""
    return dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE))


def quick_start(text: str) -> str:
    section = text.split("## Quick start")[1].split("## Training procedure")[0]
    (block,) = re.findall(r"```python\n(.*?)\n```", section, re.DOTALL)
    return block


def run_quick_start(text: str, folder: Path, samples: bool = True) -> str:
    """What the code of a card prints, run in a folder; `samples=False` makes it greedy."""
    code = quick_start(text)
    if not samples:
        assert code.count("max_new_tokens=128") == 1
        code = code.replace("max_new_tokens=128", "max_new_tokens=128, do_sample=False")
    script = folder / "quick_start.py"
    script.write_text(code)
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        runpy.run_path(str(script))
    return printed.getvalue().strip()


def generated(model, tokenizer, text: str) -> str:
    """What a model answers, greedily, to the question of a card."""
    (question,) = re.findall(r'^question = "(.*)"$', text, re.MULTILINE)
    asked = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.eval().generate(**inputs, max_new_tokens=128, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()
