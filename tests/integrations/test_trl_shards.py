"""TRL's own trainers with prefkern's head under FSDP2 and ZeRO: two ranks against one process.

DeepSpeed's runs need DeepSpeed (make test-zero).
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from prefkern.integrations.trl.asking import ASKED_FROM

if not ASKED_FROM.contains(metadata.version("trl")):
    pytest.skip("this TRL's models are not asked for log-probs", allow_module_level=True)

from support.trl_shards import CASES, launch, outcome_of
from support.zero import errors

MODES = ("FSDP2", "ZeRO-2", "ZeRO-3")
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder of a mode's runs, which are launched when the first test asks for them."""
    found: dict[str, Path] = {}

    def of(mode: str) -> Path:
        if mode not in found:
            found[mode] = tmp_path_factory.mktemp(mode)
            launch(found[mode], mode)
        return found[mode]

    return of


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "mode",
    [pytest.param(mode, marks=NEEDS_DEEPSPEED if "ZeRO" in mode else ()) for mode in MODES],
)
def test_gradients_and_logs_are_those_of_one_process(ranks, tmp_path, mode, case):
    folder = ranks(mode)
    expected = outcome_of(tmp_path, case, ranks=1)
    for rank in range(2):
        worst = errors(case, torch.load(folder / f"rank{rank}.pt")[case], expected)
        # The adapter's first factors have no gradient while the second are 0.
        assert worst["still"] <= 0.5
        assert max(worst["gradients"], worst["weights"], worst["logs"]) <= 1e-5, worst
