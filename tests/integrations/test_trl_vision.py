"""prefkern in TRL with pictures: TRL's own collator, a tiny Llava."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import transformers

from support import tiny

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
# So that TRL sends nothing over the network.
os.environ.setdefault("CI", "1")

from trl import DPOConfig
from trl import DPOTrainer as PlainDPOTrainer

import twins
from prefkern.integrations.trl import DPOTrainer

QUICK = {"max_steps": 2}


def _with_pictures():
    """A tiny Llava, its processor, and pairs with a picture each."""
    image = pytest.importorskip("PIL.Image")
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": 16, "width": 16}
    processor = transformers.LlavaProcessor(
        pil.CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **small, num_attention_heads=4, image_size=16, patch_size=8
        ),
        text_config=tiny.model().config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    pixels = torch.randint(0, 255, (8, 16, 16, 3), dtype=torch.uint8).numpy()
    rows = [
        {**row, "prompt": f"<image> {row['prompt']}", "images": [image.fromarray(pixels[i])]}
        for i, row in enumerate(tiny.pairs(8))
    ]
    model = transformers.LlavaForConditionalGeneration(config)
    return model, processor, datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_a_model_that_sees(objective):
    """With TRL's own collator of pictures; an objective without a reference loads no reference."""
    model, processor, rows = _with_pictures()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.5)
    given = {
        "train_dataset": rows,
        "eval_dataset": rows,
        "processing_class": processor,
        "max_length": None,
        # Adam makes whole steps of the vision tower's smallest gradients, which are rounding.
        "optim": "sgd",
        **QUICK,
        **twins.WHOLE,
    }
    if objective == "simpo":
        trained = twins.run(
            DPOTrainer, DPOConfig, model=model, objective="simpo", beta=2.5, **given
        )
        assert trained.trainer.ref_model is None and trained.logs[0]["loss"] > 0
        return
    pair = [
        twins.run(
            kind, DPOConfig, model=copy.deepcopy(model), ref_model=copy.deepcopy(reference), **given
        )
        for kind in (PlainDPOTrainer, DPOTrainer)
    ]
    assert any("vision_tower" in name for name in pair[0].gradients[0])
    assert twins.compare("", *pair).worst <= twins.BOUND


def test_a_length_that_cuts_a_picture_is_named():
    """TRL names it, too; the model's own message has only numbers of tokens."""
    model, processor, rows = _with_pictures()
    given = {"train_dataset": rows, "processing_class": processor, "max_length": 3, **QUICK}
    given["ref_model"] = copy.deepcopy(model)
    messages = {
        PlainDPOTrainer: r"`max_length` \(3\) is too short",
        DPOTrainer: "max_length is 3, which cuts placeholders of an image from a prompt",
    }
    for kind, message in messages.items():
        with pytest.raises(ValueError, match=message):
            twins.run(kind, DPOConfig, model=model, **given)
