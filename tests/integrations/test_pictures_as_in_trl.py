"""PreferenceTrainer on pairs with pictures, held to TRL's DPOTrainer over whole short runs."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("PIL")

import pictures as page
import twins
from support import pictures
from support.pictures import FAMILIES, Family


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_whole_runs(family: Family) -> None:
    assert page.twin(family).worst <= twins.BOUND


@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_conversations(family: Family) -> None:
    assert page.twin(family, chats=True).worst <= twins.BOUND


@pytest.mark.parametrize("family", FAMILIES[1:3], ids=str)
def test_adapters(family: Family) -> None:
    assert page.twin(family, peft_config=pictures.lora()).worst <= twins.BOUND
