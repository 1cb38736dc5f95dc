"""transformers' tensor parallelism, whose head is cut by its rows: two ranks against one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import prefkern
from support import tiny
from support.ranks import run_on_two_ranks

# Older ones were not tried.
IS_TRIED = Version(transformers.__version__) >= Version("5.23")
REF_LOGPS = torch.linspace(-30, -20, 4)


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(5, tiny.VOCAB_SIZE, (4, 12))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def seen_by(model: Any) -> dict[str, Any]:
    """Loss, log-probs and whole gradients, by a model's own call and by its hidden states."""
    loss_fn = prefkern.FusedPreferenceLoss(prefkern.objectives.build("dpo"))
    given = batch()
    found: dict[str, Any] = {"head": str(getattr(model.lm_head.weight, "placements", None))}
    with torch.no_grad():
        ids, mask = given["input_ids"], given["attention_mask"]
        found["logps"] = prefkern.token_logprobs(model, ids, mask)
    for name in ("preference_outputs", "hidden states"):
        model.zero_grad()
        if name == "preference_outputs":
            out = prefkern.preference_outputs(model, given, loss_fn, ref_logps=REF_LOGPS)
        else:
            hidden = model.model(given["input_ids"]).last_hidden_state
            labels = torch.nn.functional.pad(given["labels"][:, 1:], (0, 1), value=-100)
            out = loss_fn(hidden, model.lm_head.weight, labels, ref_logps=REF_LOGPS)
        out.loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        assert all(x is not None for x in gradients.values())
        found[name] = {
            "loss": out.loss.item(),
            "head": str(getattr(gradients.get("lm_head.weight"), "placements", None)),
            "gradients": {
                key: (x.full_tensor() if hasattr(x, "full_tensor") else x).clone()
                for key, x in gradients.items()
            },
        }
    return found


def built(is_tied: bool) -> transformers.PreTrainedModel:
    return tiny.model("Llama", tie_word_embeddings=is_tied)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    for is_tied in (False, True):
        built(is_tied).save_pretrained(folder / str(is_tied))
    run_on_two_ranks(__file__, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.skipif(not IS_TRIED, reason="DistributedConfig was tried with transformers 5.23")
@pytest.mark.parametrize("is_tied", [False, True])
def test_two_ranks_and_one_process(is_tied, ranks):
    whole = seen_by(built(is_tied))
    for each in ranks:
        found = each[str(is_tied)]
        assert found["head"] == "(Shard(dim=0),)"
        torch.testing.assert_close(found["logps"], whole["logps"], rtol=1e-5, atol=1e-5)
        for name in ("preference_outputs", "hidden states"):
            mine, true = found[name], whole[name]
            assert mine["loss"] == pytest.approx(true["loss"], rel=1e-6)
            assert is_tied or mine["head"] == "(Shard(dim=0),)"
            assert mine["gradients"].keys() == true["gradients"].keys()
            for key, gradient in true["gradients"].items():
                error = (mine["gradients"][key] - gradient).norm() / gradient.norm()
                assert error < 1e-5, (name, key, error)


def _as_rank(folder: Path) -> None:
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {}
    for is_tied in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / str(is_tied), distributed_config=DistributedConfig(tp_size=2)
        )
        found[str(is_tied)] = seen_by(model)
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _as_rank(Path(sys.argv[1]))
