"""`fuse_head` under TRL's trainers that hold logits, CPO and ORPO: undone, and refused by name.

Whole runs beside TRL's own are in test_trl.py (`twins`).
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from prefkern.integrations.trl import fuse_head, restore_head
from support import tiny
from support.trl_runs import build

V = tiny.VOCAB_SIZE


def test_fuse_head_is_of_one_trainer_and_undone(tmp_path):
    one, other = (build(tmp_path, CPOTrainer, CPOConfig) for _ in range(2))
    assert fuse_head(fuse_head(one), workspace_mb=64) is one
    assert one.concatenated_forward.workspace_mb == 64
    assert "concatenated_forward" not in vars(other)
    assert restore_head(restore_head(one)) is one
    assert one.concatenated_forward.__func__ is CPOTrainer.concatenated_forward


def test_fuse_head_refuses_by_name(tmp_path):
    class Own(CPOTrainer):
        def get_batch_loss_metrics(self, *args, **kwargs):
            return super().get_batch_loss_metrics(*args, **kwargs)

    with pytest.raises(
        ValueError, match="Own overrides get_batch_loss_metrics, which may read logits"
    ):
        fuse_head(build(tmp_path, Own, CPOConfig))
    trainer = build(tmp_path, CPOTrainer, CPOConfig)
    with pytest.raises(ValueError, match="backend must be"):
        fuse_head(trainer, backend="cuda")
    with pytest.raises(ValueError, match="workspace_mb"):
        fuse_head(trainer, workspace_mb=-1)
    trainer.model.final_logits_bias = torch.zeros(1, V)
    with pytest.raises(ValueError, match="LlamaForCausalLM adds final_logits_bias to its logits"):
        fuse_head(trainer)
    del trainer.model.final_logits_bias
    trainer.concatenated_forward = print
    with pytest.raises(
        ValueError, match="the trainer's concatenated_forward was replaced by .* already"
    ):
        fuse_head(trainer)


def test_orpos_terms_must_name_the_same_tokens(tmp_path):
    trainer = fuse_head(build(tmp_path, ORPOTrainer, ORPOConfig))
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    labels = batch["chosen_labels"]
    labels[labels != -100] = 5
    with pytest.raises(ValueError, match="chosen_labels and chosen_input_ids differ, and both"):
        trainer.compute_loss(trainer.model, batch)


def test_a_forward_without_a_body_says_so():
    from prefkern.integrations.trl.head import _FusedForward

    with pytest.raises(NotImplementedError, match=r"does not define __call__\(model, batch\)"):
        _FusedForward(None, None, None)(torch.nn.Linear(1, 1), {})
