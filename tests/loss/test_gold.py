"""A third, gold response beside each pair (TPO), against TRL's own code on logits in float64."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import prefkern
from prefkern import FusedPreferenceLoss, objectives, reference
from prefkern.objectives import DPO, TPO, Adaptive, Mixture
from support.machine import BACKENDS

F = torch.nn.functional
B, T, H, V = 3, 9, 16, 61
IGNORED = -100


def batch(dtype=torch.float64, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Rows of different lengths, the gold ones the longest."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(V, (3 * B, T), generator=generator)
    labels[:, :2] = IGNORED
    for row, first in ((0, 5), (1, 8), (3, 4), (4, 6), (5, 3), (7, 7)):
        labels[row, first:] = IGNORED
    given = {
        "hidden": torch.randn((3 * B, T, H), generator=generator, dtype=torch.float64),
        "weight": torch.randn((V, H), generator=generator, dtype=torch.float64),
    }
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in given.items()}
    return {**leaves, "labels": labels.to(device)}


def packed(given: dict) -> dict:
    cu_seqlens = torch.arange(3 * B + 1, device=given["labels"].device) * T
    flat = {name: given[name].flatten(0, 1) for name in ("hidden", "labels")}
    return {**given, **flat, "cu_seqlens": cu_seqlens}


def gradients(loss: torch.Tensor, given: dict) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [given["hidden"], given["weight"]]))


TRLS = {
    "sigmoid": {"beta": 0.2, "label_smoothing": 0.1},
    "hinge": {"beta": 0.2},
    "ipo": {"beta": 0.3, "tpo_alpha": 0.5},
    "tpo-l": {"beta": 2.0, "tpo_l_gamma": 0.8, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("loss_type", TRLS)
def test_a_batch_is_trls(loss_type):
    trainer = pytest.importorskip("trl.experimental.tpo").TPOTrainer
    options = {"label_smoothing": 0.0, "tpo_alpha": 0.7, "tpo_l_gamma": 0.5} | TRLS[loss_type]
    given = batch()
    scored = given["labels"] != IGNORED
    tokens = F.pad(given["labels"].clamp(min=0), (1, 0))
    # TRL shifts: the last logit of a row predicts nothing.
    logits = F.pad(given["hidden"] @ given["weight"].T, (0, 0, 0, 1))
    state = SimpleNamespace(
        model=torch.nn.Module().eval(),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        loss_type=loss_type,
        _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)},
        **options,
    )
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "completion_mask": F.pad(scored.long(), (1, 0)),
    }
    model = lambda **_: SimpleNamespace(logits=logits)
    theirs = trainer._compute_loss(state, model, inputs, return_outputs=False)
    if loss_type != "tpo-l":
        options.pop("tpo_l_gamma")
    objective = TPO(loss_type=loss_type, token_mean=True, **options)
    mine = FusedPreferenceLoss(objective, backend="torch")(**given).loss
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    for x, true in zip(gradients(mine, given), gradients(theirs, given), strict=True):
        assert (x - true).norm() <= 1e-12 * true.norm()


OBJECTIVES = {
    "tpo": lambda: TPO(0.2),
    "hinge": lambda: TPO(0.2, "hinge"),
    "ipo, by token": lambda: TPO(0.3, "ipo", token_mean=True),
    "tpo-l, adaptive": lambda: TPO(2.0, "tpo-l", adaptive=Adaptive()),
    "several": lambda: Mixture([DPO(0.2), TPO(0.1, tpo_alpha=0.5)], [0.7, 1.5]),
    "nll": lambda: objectives.build("adatpo", rpo_alpha=0.3),
}


@pytest.mark.parametrize("ld_alpha", [None, 0.4])
@pytest.mark.parametrize("layout", [lambda given: given, packed], ids=["padded", "packed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_path_is_the_oracle(name, layout, ld_alpha, backend, device):
    """Value and gradient; on the triton backend the pair kernel ran, once for each objective."""
    sums = {"ref_logps": torch.linspace(-20, -9, 2 * B, dtype=torch.float64)}
    truth = batch()
    objective = OBJECTIVES[name]()
    reads = objective.needs_reference
    expected = reference.preference_loss(
        objective, **truth, **(sums if reads else {}), ld_alpha=ld_alpha
    )
    given = layout(leaves := batch(torch.float32, device))
    loss_fn = FusedPreferenceLoss(
        OBJECTIVES[name](), workspace_mb=1, backend=backend, ld_alpha=ld_alpha
    )
    extra = {"ref_logps": sums["ref_logps"].float().to(device)} if reads else {}
    before = launches()
    out = loss_fn(**given, **extra, return_stats=True)
    parts = 2 if name == "several" else 1
    assert launches() - before == (parts if backend == "triton" else 0)
    assert out.plan.backend == backend
    torch.testing.assert_close(out.losses.cpu().double(), expected.losses, rtol=1e-5, atol=1e-5)
    for field in ("gold_logps", "chosen_logps", "chosen_gradients", "rejected_gradients"):
        mine, true = getattr(out, field), getattr(expected, field)
        torch.testing.assert_close(mine.cpu().double(), true, rtol=1e-5, atol=1e-5, msg=field)
    assert torch.equal(out.gold_lengths.cpu(), expected.gold_lengths)
    assert out.token_stats.logps.shape == given["labels"].shape
    true = gradients(expected.loss, truth)
    for x, y in zip(gradients(out.loss, leaves), true, strict=True):
        assert (x.cpu().double() - y).norm() <= 1e-5 * y.norm()


def launches() -> int:
    if "triton" not in BACKENDS:
        return 0
    import prefkern_kernels

    return prefkern_kernels.launches["pair_loss"]


def test_gold_tokens_have_their_own_gradient_alone():
    """The pair's part does not reach the gold rows, nor the gold term the others."""
    given = batch()
    (plain,) = torch.autograd.grad(
        FusedPreferenceLoss(TPO(0.2, tpo_alpha=0.0))(
            given["hidden"][: 2 * B], given["weight"], given["labels"][: 2 * B]
        ).loss,
        given["hidden"],
    )
    full, _ = gradients(FusedPreferenceLoss(TPO(0.2))(**given).loss, given)
    torch.testing.assert_close(full[: 2 * B], plain[: 2 * B], rtol=1e-12, atol=1e-15)
    assert (plain[2 * B :] == 0).all() and (full[2 * B :].abs().sum((1, 2)) > 0).all()


def test_an_empty_gold_response_has_no_term(backend, device):
    given = batch(torch.float32, device)
    given["labels"][2 * B :] = IGNORED
    out = FusedPreferenceLoss(TPO(0.2), backend=backend)(**given)
    assert out.gold_logps.tolist() == [0.0] * B and out.gold_lengths.tolist() == [0] * B
    without = FusedPreferenceLoss(TPO(0.2, tpo_alpha=0.0), backend=backend)(
        given["hidden"][: 2 * B], given["weight"], given["labels"][: 2 * B]
    )
    assert torch.equal(out.losses, without.losses)


def test_a_reference_is_of_the_pairs_alone(device):
    """Through its own head it scores all rows; its sums are of two of three."""
    given = batch(torch.float32, device)
    objective = Mixture([DPO(0.2), TPO(0.1)])
    head = {"ref_hidden": given["hidden"].detach() + 0.1, "ref_weight": given["weight"].detach()}
    by_head = FusedPreferenceLoss(objective)(**given, **head)
    sums = torch.cat([by_head.ref_chosen_logps, by_head.ref_rejected_logps])
    assert len(sums) == 2 * B
    by_sums = FusedPreferenceLoss(objective)(**given, ref_logps=sums)
    torch.testing.assert_close(by_head.losses, by_sums.losses, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"ref_logps must .*\[6\]"):
        FusedPreferenceLoss(objective)(**given, ref_logps=torch.zeros(3 * B, device=device))


def test_rows_that_are_no_triples_are_refused(device):
    given = batch(torch.float32, device)
    loss_fn = FusedPreferenceLoss(TPO())
    with pytest.raises(ValueError, match=r"labels must have shape \[3B, T\], B chosen rows.* gold"):
        loss_fn(given["hidden"][:4], given["weight"], given["labels"][:4])
    flat = packed(given) | {"cu_seqlens": torch.tensor([0, T, 3 * B * T], device=device)}
    with pytest.raises(ValueError, match=r"cu_seqlens must have shape \[3B \+ 1\], got \[3\]"):
        loss_fn(**flat)


def test_what_is_not_finite_is_named(device):
    given = batch(torch.float32, device)
    hidden = given["hidden"].detach().clone()
    hidden[2 * B + 1, 3, 0] = math.nan
    loss_fn = FusedPreferenceLoss(TPO(), on_nonfinite="raise")
    with pytest.raises(FloatingPointError) as error:
        loss_fn(hidden, given["weight"], given["labels"])
    message = str(error.value)
    assert "1 of 3 gold log-probs are not finite, the first at 1" in message
    assert "token 3 of sequence 7 (the gold response of pair 1)" in message
    with pytest.raises(ValueError, match="gold responses are of pairs"):
        prefkern.diagnostics.explain_nonfinite(
            hidden, given["weight"], given["labels"], paired=False, gold=True
        )
