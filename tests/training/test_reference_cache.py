"""The reference's sums on disk: found by content, recomputed if damaged, resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from support import tiny

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file

from prefkern.ops import cpu
from prefkern.training import reference_cache
from support.reference_sums import PAIRS, Forwards, precomputing, shards, sums, sums_from_logits
from support.training import assert_same_weights, lora, trainer, weights

SHARDS = {"000000000-000000004", "000000004-000000008", "000000008-000000010"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(reference_cache, "_SHARD_PAIRS", 4)


def test_sums_are_computed_once_and_found_by_every_later_run(tmp_path):
    options = {"eval_dataset": {"one": tiny.dataset(3, 5), "two": tiny.dataset(PAIRS)}}
    first, rows = precomputing(tmp_path, **options)
    # The second dataset to evaluate on is the one to train on.
    assert rows == 2 * (PAIRS + 3)
    torch.testing.assert_close(
        sums(first.train_dataset).double(),
        sums_from_logits(tiny.model(seed=1), first.train_dataset),
        atol=1e-4,
        rtol=1e-6,
    )
    # Of what sums do not depend on, all may change.
    others = {"objective": "ipo", "learning_rate": 0.5, "seed": 3, "pad_to_multiple_of": 8}
    second, rows = precomputing(tmp_path, **options, **others)
    assert rows == 0
    for mine, found in (
        (first.train_dataset, second.train_dataset),
        (first.eval_dataset["one"], second.eval_dataset["one"]),
        (first.eval_dataset["two"], second.eval_dataset["two"]),
    ):
        assert torch.equal(sums(mine), sums(found))
    assert len({file.parent for file in shards(tmp_path).values()}) == 2

    counted = Forwards(second.ref_model)
    second.evaluate(tiny.dataset(3, 5))
    assert counted.rows == 0
    second.evaluate(tiny.dataset(2, 6))
    assert counted.rows == 4


def test_found_sums_train_bit_for_bit_as_computed_ones(tmp_path):
    """With dropout: neither computing nor finding them changes the random state."""
    options = {"peft_config": peft.LoraConfig(r=4, lora_dropout=0.5), "disable_dropout": False}
    runs, states = [], []
    for _ in range(2):
        run = trainer(tmp_path, count=8, precompute_ref_log_probs=True, **options)
        states.append(torch.get_rng_state())
        run.train()
        runs.append(weights(run.model))
    assert len(shards(tmp_path)) == 2
    assert torch.equal(*states)
    assert_same_weights(*runs, atol=0, rtol=0)


def test_sums_on_disk_are_those_computed_on_the_fly(tmp_path):
    computed, _ = precomputing(tmp_path, per_device_eval_batch_size=4, lr_scheduler_type="linear")
    batch = next(iter(computed.get_eval_dataloader(computed.train_dataset)))
    on_the_fly = computed._reference_logps({k: v for k, v in batch.items() if k != "ref_logps"})
    assert torch.equal(batch["ref_logps"], on_the_fly)


def _one_weight(options):
    model = tiny.model(seed=1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    options["reference"] = model


def _one_token(options):
    rows = tiny.pairs(PAIRS)
    rows[7]["rejected"] = " good" + rows[7]["rejected"][5:]
    options["train_dataset"] = datasets.Dataset.from_list(rows)


def _order(options):
    options["train_dataset"] = tiny.dataset(PAIRS).select(reversed(range(PAIRS)))


CHANGES = {
    "a weight": _one_weight,
    "a token": _one_token,
    "the order": _order,
    "dtype": lambda options: options.update(reference=tiny.model(seed=1).bfloat16()),
    "autocast": lambda options: options.update(bf16=True),
    "truncation": lambda options: options.update(max_length=9),
    "softcap": lambda options: options.update(
        reference=tiny.model("Gemma2", 1, final_logit_softcapping=5.0)
    ),
    "attention": lambda options: options.update(
        reference=tiny.model(seed=1, attn_implementation="eager")
    ),
    "configuration": lambda options: options.update(
        reference=tiny.model(seed=1, rms_norm_eps=1e-5)
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_sums_depend_on_is_part_of_the_key(tmp_path, what):
    family = {"reference": tiny.model("Gemma2", 1)} if what == "softcap" else {}
    precomputing(tmp_path, **family)
    options: dict = {}
    CHANGES[what](options)
    _, rows = precomputing(tmp_path, **options)
    assert rows == 2 * PAIRS


def test_another_version_computes_its_own(tmp_path, monkeypatch):
    precomputing(tmp_path)
    monkeypatch.setattr(reference_cache, "VERSION", "0.0.0")
    assert precomputing(tmp_path)[1] == 2 * PAIRS


def test_another_arithmetic_computes_its_own(tmp_path, monkeypatch):
    """Sums that were added in another order differ in their last bits."""
    precomputing(tmp_path)
    assert precomputing(tmp_path)[1] == 0
    monkeypatch.setattr(reference_cache, "_SUMS", reference_cache._SUMS + 1)
    assert precomputing(tmp_path)[1] == 2 * PAIRS
    for name in ("has_bfloat16_units", "has_wide_product"):
        has = getattr(cpu, name)()
        monkeypatch.setattr(cpu, name, lambda has=has: not has)
        assert precomputing(tmp_path)[1] == 2 * PAIRS


def test_adapter_of_a_reference_is_part_of_the_key(tmp_path):
    """The key depends on its weights, and on its configuration."""

    def reference(alpha: int, std: float):
        model = peft.get_peft_model(tiny.model(), peft.LoraConfig(r=4, lora_alpha=alpha))
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=std)
        return model

    for alpha, std, computed in ((8, 0.1, True), (16, 0.1, True), (16, 0.2, True), (8, 0.1, False)):
        _, rows = precomputing(tmp_path, reference=reference(alpha, std))
        assert rows == 2 * PAIRS * computed


def test_adapters_find_the_sums_of_their_base(tmp_path):
    def adapted(seed: int, change: float = 0.0):
        model = tiny.model()
        with torch.no_grad():
            model.model.norm.weight[0] += change
        forwards = Forwards(model)
        options = {"peft_config": lora(), "seed": seed, "count": PAIRS}
        return trainer(tmp_path, model=model, precompute_ref_log_probs=True, **options), forwards

    first, forwards = adapted(seed=1)
    assert forwards.rows == 2 * PAIRS
    # Another seed starts the adapter elsewhere, which the base model knows nothing of.
    second, forwards = adapted(seed=2)
    assert forwards.rows == 0
    assert torch.equal(sums(first.train_dataset), sums(second.train_dataset))
    # Nor does training it.
    second.train()
    counted = Forwards(second.model)
    metrics = second.evaluate(tiny.dataset(PAIRS))
    assert counted.rows == 2 * PAIRS  # the policy's
    assert metrics["eval_rewards/margins"] != 0
    assert adapted(seed=1, change=1e-3)[1].rows == 2 * PAIRS


def _truncate(file: Path):
    file.write_bytes(file.read_bytes()[:-5])


def _empty(file: Path):
    file.write_bytes(b"")


def _flip_a_bit(file: Path):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _take_from_another(file: Path):
    save_file(load_file(file), file, metadata={"key": "another", "checksum": "?"})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_truncate, "incomplete|invalid|larger"),
        (_empty, "header|small"),
        (_flip_a_bit, "its checksum is wrong"),
        (_take_from_another, "it belongs to another model or dataset"),
    ],
)
def test_spoiled_shards_are_computed_again(tmp_path, spoil, reason, caplog):
    first, _ = precomputing(tmp_path)
    assert shards(tmp_path).keys() == SHARDS
    file = shards(tmp_path)["000000004-000000008"]
    spoil(file)
    second, rows = precomputing(tmp_path)
    (warning,) = (r.getMessage() for r in caplog.records if "cannot be used" in r.getMessage())
    assert warning.startswith(f"{file} cannot be used (") and "4 pairs" in warning
    assert any(part in warning for part in reason.split("|")), warning
    assert rows == 2 * 4
    assert torch.equal(sums(first.train_dataset), sums(second.train_dataset))
    assert precomputing(tmp_path)[1] == 0


def test_interrupted_computation_resumes(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        precomputing(tmp_path, dies_after=2 * 7)
    assert shards(tmp_path).keys() == {"000000000-000000004"}
    resumed, rows = precomputing(tmp_path)
    assert rows == 2 * 6
    whole, rows = precomputing(tmp_path, ref_cache_dir=str(tmp_path / "elsewhere"))
    assert rows == 2 * PAIRS
    torch.testing.assert_close(
        sums(resumed.train_dataset), sums(whole.train_dataset), atol=1e-5, rtol=1e-6
    )
    assert shards(tmp_path).keys() == SHARDS


def test_interrupted_writing_leaves_nothing_half_written(tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(KeyboardInterrupt):
        precomputing(tmp_path)
    assert not [file for file in (tmp_path / "reference-sums").rglob("*") if file.is_file()]


def test_without_a_place_to_keep_them_sums_are_computed(tmp_path, caplog):
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    for folder in (str(nowhere / "folder"), ""):
        run, rows = precomputing(tmp_path, ref_cache_dir=folder)
        assert rows == 2 * PAIRS
        assert sums(run.train_dataset).shape == (2, PAIRS)
    assert len([r for r in caplog.records if "sums are not kept" in r.getMessage()]) == 1
    # What a collator of one's own feeds the model is unknown.
    collator = run.data_collator
    for _ in range(2):
        assert precomputing(tmp_path, data_collator=collator)[1] == 2 * PAIRS
    assert "a data_collator was given" in caplog.text


def test_default_folder_is_in_the_hubs(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))
    assert precomputing(tmp_path, ref_cache_dir=None)[1] == 2 * PAIRS
    assert len(list((tmp_path / "hub" / "prefkern").rglob("*.safetensors"))) == 3
    assert precomputing(tmp_path, ref_cache_dir=None)[1] == 0


def test_key_says_what_it_is_of(tmp_path):
    precomputing(tmp_path)
    (file,) = (tmp_path / "reference-sums").glob("*/key.json")
    described = json.loads(file.read_text())
    assert described["model"].endswith("LlamaForCausalLM")
    assert described["versions"].keys() == {"prefkern", "sums", "torch", "transformers"}
    assert described["arithmetic"]["backend"] == "torch"
    assert described["transform"] == [1.0, None]


def test_hash_of_tokens_knows_where_each_sequence_ends():
    """The same tokens in order, with other boundaries between pairs or columns."""

    def of(prompts, chosen, rejected) -> str:
        columns = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
        return reference_cache.hash_tokens(datasets.Dataset.from_dict(columns))

    hashes = {
        of([[1], [2]], [[3, 4], [5]], [[6], [7]]),
        of([[1], [2]], [[3], [4, 5]], [[6], [7]]),
        of([[1], [2]], [[3], [4]], [[5, 6], [7]]),
        of([[1], [2]], [[4, 3], [5]], [[6], [7]]),
    }
    assert len(hashes) == 4
    assert of([[1], [2]], [[3, 4], [5]], [[6], [7]]) in hashes


def test_hash_of_weights():
    """The same content in any memory layout has one hash, other content has another."""
    model = tiny.model()
    hashed = reference_cache.hash_weights(model)
    assert hashed == reference_cache.hash_weights(tiny.model())
    transposed = tiny.model()
    weight = transposed.lm_head.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert reference_cache.hash_weights(transposed) == hashed
    assert reference_cache.hash_weights(tiny.model().bfloat16()) != hashed
    # Both have these weights in bfloat16, and one of them also its rotary frequencies.
    rounded, frequencies = tiny.model().bfloat16(), tiny.model().bfloat16()
    frequencies.model.rotary_emb.inv_freq = tiny.model().model.rotary_emb.inv_freq
    pair = [each.state_dict() for each in (rounded, frequencies)]
    assert all(torch.equal(value, pair[1][name]) for name, value in pair[0].items())
    assert reference_cache.hash_weights(rounded) != reference_cache.hash_weights(frequencies)
    assert reference_cache.hash_weights(tiny.model().to("meta")) is None


def test_hash_of_weights_takes_little_memory(monkeypatch):
    monkeypatch.setattr(reference_cache, "_PIECE_BYTES", 2**16)
    model = torch.nn.Linear(1024, 1024, bias=False)
    model.weight.requires_grad_(False)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != weight:
                self.bytes = max(self.bytes, out.untyped_storage().nbytes())
            return out

    weight = model.weight.untyped_storage().data_ptr()
    with Largest() as largest:
        reference_cache.hash_weights(model)
    assert largest.bytes <= 2**16
