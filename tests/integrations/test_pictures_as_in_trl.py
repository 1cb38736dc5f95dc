"""PreferenceTrainer on pairs with pictures, held to TRL's DPOTrainer over whole short runs."""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("PIL")
peft = pytest.importorskip("peft")
# So that TRL sends nothing over the network.
os.environ.setdefault("CI", "1")

from trl import DPOConfig
from trl import DPOTrainer as PlainDPOTrainer

import twins
from prefkern import PreferenceConfig, PreferenceTrainer
from support import pictures
from support.pictures import FAMILIES, Family

QUICK = {"max_steps": 3, "optim": "sgd", "learning_rate": 1e-2}


dpo_config = functools.partial(PreferenceConfig, objective="dpo", beta=0.1)


def _twin(family: Family, chats: bool = False, **options: Any) -> twins.Twin:
    model, processor = family.make()
    reference = None if "peft_config" in options else family.make(1)[0]
    for each in (model, reference):
        if family.name == "Gemma3" and each is not None:
            # TRL caps the logits as the text's config says, which the model does not.
            each.config.text_config.final_logit_softcapping = None
        if each is not None:
            # A vision tower's smallest gradients are rounding in float32.
            each.double()
    given = {
        "train_dataset": pictures.dataset(family, 12, chats=chats),
        "eval_dataset": pictures.dataset(family, 8, seed=3, chats=chats),
        "processing_class": processor,
        "max_length": None,
        **QUICK,
        **twins.WHOLE,
        **options,
    }
    theirs, ours = (
        twins.run(
            kind,
            make_config,
            model=copy.deepcopy(model),
            ref_model=copy.deepcopy(reference),
            **given,
        )
        for kind, make_config in ((PlainDPOTrainer, DPOConfig), (PreferenceTrainer, dpo_config))
    )
    # Our own trainer counts tokens of training alone.
    return twins.compare(str(family), theirs, ours, ("eval_num_tokens",))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_whole_runs(family: Family) -> None:
    assert _twin(family).worst <= twins.BOUND


@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_conversations(family: Family) -> None:
    assert _twin(family, chats=True).worst <= twins.BOUND


@pytest.mark.parametrize("family", FAMILIES[1:3], ids=str)
def test_adapters(family: Family) -> None:
    pattern = r".*(language_model|text_model).*\.(q_proj|v_proj)"
    adapter = peft.LoraConfig(r=4, target_modules=pattern, init_lora_weights=False)
    assert _twin(family, peft_config=adapter).worst <= twins.BOUND
