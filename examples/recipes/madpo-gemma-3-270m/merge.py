"""A model and the LoRA adapter that was trained on it, as one model: `merge.py ADAPTER FOLDER`.

The policy of stage 4 has an adapter of its own, and its reference is the SFT model as a whole.
"""

from __future__ import annotations

import sys

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer


def main(adapter: str, folder: str) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    model.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
