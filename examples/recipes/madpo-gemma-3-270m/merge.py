"""Merges a LoRA adapter into its base model and saves the result: `merge.py ADAPTER FOLDER`.

The policy of stage 4 gets a new adapter, and its reference is the whole SFT model. So the adapter
of stage 1 is merged first.
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
