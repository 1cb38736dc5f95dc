"""Context parallelism in the trainer: ranks that cut sequences against one process, by `support.context_parallel`.

One launch by torchrun runs all cases.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")
# Where the torch installed has its ring attention elsewhere, a CPU's kernel cannot be put into it.
pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._attention")

from accelerate.parallelism_config import ParallelismConfig

from prefkern import PreferenceConfig, PreferenceTrainer
from prefkern.data.collate import ExampleCollator, PreferenceCollator
from prefkern.models.scoring import align_labels
from prefkern.training import context_parallel
from prefkern.training.context_parallel import check_cut_model, cut_rows
from support import tiny
from support.context_parallel import CASES, GROUPS, LONG, OTHERS, launch, outcome_of
from support.ddp import RESUMES
from support.training import config
from support.versions import PARALLELISM
from support.zero import errors

LN2 = math.log(2)


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory) -> Path:
    if PARALLELISM.is_too_old:
        pytest.skip(PARALLELISM.reason)
    folder = tmp_path_factory.mktemp("ranks")
    is_long = request.config.getoption("--long")
    others = OTHERS if is_long and RESUMES else ()
    launch(folder, *(case for case in CASES if is_long or case not in LONG), *others)
    return folder


def assert_same_runs(folder: Path, case: str, count: int) -> None:
    expected = outcome_of(folder / "one process", case, ranks=1)
    # FSDP2 casts weights, autocast casts operands: in bfloat16 the two round at other places.
    tolerance = 0.1 if "bf16" in case else 1e-5
    for rank in range(count):
        found = torch.load(folder / f"rank{rank}.pt")[case]
        worst = errors(case, found, expected)
        # The adapter's first factors have no gradient while the second are 0.
        assert worst["still"] <= 0.5
        assert max(worst["gradients"], worst["weights"], worst["logs"]) <= tolerance, worst
        if found["is_own_reference"]:
            assert found["logs"][0]["loss"] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long if case in LONG else ()) for case in CASES]
)
def test_gradients_and_logs_are_those_of_one_process(ranks, case):
    assert_same_runs(ranks, case, 2)


@PARALLELISM.needed
@pytest.mark.long
def test_two_sequences_beside_one_another(tmp_path):
    """Four ranks, two to a sequence: the losses of two batches, and each pair in the metrics once."""
    launch(tmp_path, *GROUPS, count=4)
    for case in GROUPS:
        assert_same_runs(tmp_path, case, 4)


@pytest.mark.long
@pytest.mark.skipif(not RESUMES, reason="this transformers does not resume on a CPU")
def test_a_resumed_run_goes_on_bit_for_bit(ranks):
    for rank in range(2):
        whole, resumed = torch.load(ranks / f"rank{rank}.pt")["resumed"]
        assert whole["steps"] == resumed["steps"]
        assert whole["logs"] == resumed["logs"]
        for name, value in whole["weights"].items():
            assert torch.equal(value, resumed["weights"][name]), name


def rows_of(lengths: list[int]) -> list[dict]:
    return [{"prompt_ids": [7], "chosen_ids": [8] * (n - 1), "rejected_ids": [9]} for n in lengths]


def test_rows_are_shifted_whole_and_padded_to_two_parts_a_rank():
    batch = PreferenceCollator(pad_token_id=3)(rows_of([5, 3]))
    rows, cut = cut_rows({**batch, "ref_logps": torch.arange(4.0)}, size=2)
    assert {name: tuple(value.shape) for name, value in rows.items()} == {
        "input_ids": (4, 8),
        "shift_labels": (4, 8),
        "attention_mask": (4, 8),
        "position_ids": (4, 8),
        "ref_logps": (4,),
    }
    assert torch.equal(rows["shift_labels"][:, :5], align_labels(batch["labels"]))
    assert (rows["shift_labels"][:, 5:] == -100).all() and rows["attention_mask"].all()
    # A table of positions has as many rows as the longest row has tokens.
    assert rows["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert [id(each) for each in cut] == [
        id(each) for name, each in rows.items() if name != "ref_logps"
    ]
    assert batch["input_ids"].shape == (4, 5)


def test_mismatched_pairs_get_the_same_length():
    single = [
        {"prompt_ids": [7], "completion_ids": [8] * 6, "desirable": True},
        {"prompt_ids": [6, 6, 6], "completion_ids": [9], "desirable": False},
    ]
    rows, cut = cut_rows(ExampleCollator(pad_token_id=3)(single), size=2)
    assert rows["input_ids"].shape == rows["mismatched_input_ids"].shape == (2, 12)
    assert len(cut) == 8
    # One prompt alone has none, and of no rows there is nothing to cut.
    rows, cut = cut_rows(ExampleCollator(pad_token_id=3)(single[:1]), size=2)
    assert rows["mismatched_shift_labels"].shape == (0, 8) and len(cut) == 4


def test_batches_that_cannot_be_cut():
    batch = PreferenceCollator(pad_token_id=3)(rows_of([5, 3]))
    with pytest.raises(
        ValueError, match="a batch has pixel_values, which context parallelism does"
    ):
        cut_rows({**batch, "pixel_values": torch.zeros(4)}, size=2)
    left = {name: batch[name].flip(1) for name in batch}
    with pytest.raises(
        ValueError, match="a batch is padded on the left, and .*: pad it on the right"
    ):
        cut_rows(left, size=2)


SIZE = {"parallelism_config": ParallelismConfig(cp_size=2)}
BEFORE = {
    "no shards": (None, {}, "needs FSDP2, and this run has no sharding: set fsdp=True and"),
    "FSDP1": ("FSDP1", {}, "needs FSDP2, and this run has FSDP1"),
    "tensor parallelism": (
        "FSDP2",
        {"parallelism_config": ParallelismConfig(cp_size=2, tp_size=2)},
        r"is not supported together with tensor parallelism \(tp_size=2\)",
    ),
    "packing": (
        "FSDP2",
        {"padding_free": True},
        "padding_free=True is not supported under context",
    ),
    "dropout": ("FSDP2", {"disable_dropout": False}, "dropout is not .*: set disable_dropout"),
    "shared prompts": (
        "FSDP2",
        {"padding_free": True, "share_prompt": True},
        "padding_free=True is not supported under context",
    ),
    # Its size is by the length of the rows that an embedding sees, which is a rank's part.
    "noise": ("FSDP2", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 is not supported"),
    "weights of tokens": (
        "FSDP2",
        {"ld_alpha": 0.5},
        r"ld_alpha=0.5 is .* \(cp_size=2\): leave it",
    ),
}


@PARALLELISM.needed
@pytest.mark.parametrize("name", BEFORE)
def test_what_cannot_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, name):
    mode, options, message = BEFORE[name]
    args = config(tmp_path, objective="simpo", **SIZE | options)
    monkeypatch.setattr(context_parallel, "mode_of", lambda args: mode)
    # Tensor parallelism looks first, at what it is loaded for.
    if "tensor" in message:
        with pytest.raises(ValueError, match=message):
            context_parallel.check_context_parallel(args)
        return
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer("no such folder", args, tiny.dataset(8))


WINDOWS = (
    "has full causal attention alone, in layers that transformers names self_attn, and the model "
    r"\(MistralForCausalLM\) has layers of sliding_attention: "
)
MODELS = {
    "eager": (
        lambda: tiny.model(attn_implementation="eager"),
        "is torch's, of scaled_dot_product_attention, and the model has attn_implementation='eager'",
    ),
    "windows": (lambda: tiny.model("Mistral", sliding_window=4), WINDOWS),
    "other layers": (lambda: tiny.model("GPT2"), r"the model \(GPT2LMHeadModel\) has other layers"),
    "kinds of layers": (
        lambda: tiny.model("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
        "has layers of sliding_attention: leave cp_size out, and use FSDP2 alone",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_whose_attention_does_not_reach_other_ranks(name):
    make, message = MODELS[name]
    with pytest.raises(ValueError, match=message):
        check_cut_model(make(), 2, 0.0)


def test_a_router_loss_and_the_models_that_are_taken(monkeypatch):
    check_cut_model(tiny.model(), 2, 0.0)
    with pytest.raises(ValueError, match="load-balancing loss .*: set router_aux_loss_coef=0"):
        check_cut_model(tiny.model(), 2, 0.01)
    with pytest.raises(ValueError, match=r"the reference \(GPT2LMHeadModel\) has other layers"):
        check_cut_model(tiny.model("GPT2"), 2, 0.0, "reference")
    model = tiny.model()
    monkeypatch.setattr(type(model), "_is_stateful", True)
    with pytest.raises(ValueError, match=r"\(LlamaForCausalLM\) has other layers"):
        check_cut_model(model, 2, 0.0)


@PARALLELISM.needed
def test_the_size_as_accelerate_launch_says_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    assert context_parallel.size_of_launch(PreferenceConfig(str(tmp_path))) == 2
