"""Liger's layers under prefkern's head: which are replaced, and a run in the interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import MethodType

import pytest
import torch

import prefkern
from prefkern.training import rewards
from support import tiny
from support.family_table import batch
from support.processes import environment
from support.training import config, step_logs, trainer, weights

liger = pytest.importorskip("liger_kernel.transformers")

HEAD_IS_LEFT = {"fused_linear_cross_entropy": False, "cross_entropy": False}


@pytest.fixture
def applied(monkeypatch) -> list[tuple]:
    """The arguments that Liger is called with; it is not run."""
    calls: list[tuple] = []
    monkeypatch.setattr(
        liger, "_apply_liger_kernel_to_instance", lambda model, **kw: calls.append((model, kw))
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as good as a GPU
    return calls


def test_policy_and_reference_get_the_layers_and_keep_their_heads(tmp_path, applied) -> None:
    options = {"rms_norm": True, "swiglu": False}
    run = trainer(tmp_path, use_liger_kernel=True, liger_kernel_config=options)
    expected = {**options, **HEAD_IS_LEFT}
    # Before anything is computed, and not only when training starts.
    assert applied == [(run.model, expected), (run.ref_model, expected)]
    run.train()
    # Trainer's own application, of the policy again.
    assert applied[2:] == [(run.model, expected)]
    assert prefkern.last_plan().backend == "torch"

    applied.clear()
    # The same arguments once more, as they have become.
    again = trainer(
        tmp_path, use_liger_kernel=True, liger_kernel_config=run.args.liger_kernel_config
    )
    assert [options for _, options in applied] == [expected] * 2
    assert again.args.liger_kernel_config == expected


@pytest.mark.parametrize("given", ["adapter", "precomputed", "no reference"])
def test_whatever_the_reference_is(tmp_path, applied, given: str) -> None:
    peft = pytest.importorskip("peft")
    options = {
        "adapter": {"peft_config": peft.LoraConfig(r=4, task_type="CAUSAL_LM")},
        "precomputed": {"precompute_ref_log_probs": True},
        "no reference": {"objective": "simpo"},
    }[given]
    run = trainer(tmp_path, use_liger_kernel=True, **options)
    base = run.model.get_base_model() if given == "adapter" else run.model
    assert applied == [(base, HEAD_IS_LEFT)]


def test_what_would_have_no_effect_is_an_error(tmp_path, applied, monkeypatch) -> None:
    with pytest.raises(ValueError, match="no effect without use_liger_kernel=True"):
        trainer(tmp_path, liger_kernel_config={"rope": True})
    for name in HEAD_IS_LEFT:
        with pytest.raises(ValueError, match=f"{name} would replace the loss"):
            trainer(tmp_path, use_liger_kernel=True, liger_kernel_config={name: True})
    with pytest.raises(
        ValueError, match="without effect on LlamaForCausalLM: 'rmsnorm'; .*rms_norm"
    ):
        trainer(tmp_path, use_liger_kernel=True, liger_kernel_config={"rmsnorm": True})
    with pytest.raises(ValueError, match="no kernels for GPT2LMHeadModel .model type 'gpt2'"):
        trainer(tmp_path, use_liger_kernel=True, model=tiny.model("GPT2"))
    assert not applied
    monkeypatch.setattr("prefkern.models.liger.is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        trainer(tmp_path, use_liger_kernel=True)


def test_a_cpu_is_refused_before_anything_is_loaded(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    args = config(tmp_path, use_liger_kernel=True)
    with pytest.raises(ValueError, match="use_liger_kernel=True needs a GPU"):
        prefkern.PreferenceTrainer("no/such-model", args, tiny.dataset(4))


def test_a_reward_model_keeps_its_forward(tmp_path, applied) -> None:
    """Liger's default would replace a classifier's forward by a language model's."""
    import transformers

    settings = tiny.model().config
    settings.num_labels = 1
    model = transformers.AutoModelForSequenceClassification.from_config(settings)
    args = rewards.RewardConfig(
        str(tmp_path), use_cpu=True, report_to="none", use_liger_kernel=True
    )
    run = rewards.RewardTrainer(model, args, tiny.tokenizer(), 0)
    assert applied == [(model, HEAD_IS_LEFT)]
    assert run.args.liger_kernel_config == HEAD_IS_LEFT


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_ligers_own_forward_still_calls_the_head(family: str) -> None:
    """If a user has applied all of Liger: without labels its forward calls the head, too."""
    name = {"llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma2"}[family]
    model = tiny.model(name, **({"final_logit_softcapping": 0.5} if family == "gemma2" else {}))
    ids, mask, labels = batch()
    expected = prefkern.token_logprobs(model, ids, mask, labels)
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    module = __import__(f"liger_kernel.transformers.model.{family}", fromlist=["lce_forward"])
    model.forward = MethodType(module.lce_forward, model)
    del model.__dict__["_prefkern_head_transform"]
    actual = prefkern.token_logprobs(model.train(), ids, mask, labels)
    actual.sum().backward()
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)
    for each, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[each], atol=1e-6, rtol=1e-5)


@pytest.mark.long
def test_training_on_ligers_layers_is_training(tmp_path) -> None:
    """RMS norm, rotary embedding and SwiGLU by Liger, under Triton's interpreter, against torch's."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=environment(interprets=True),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    plain = _train(tmp_path, use_liger_kernel=False)
    assert theirs["layers"] == ["LigerRMSNorm"] and plain["layers"] == ["LlamaRMSNorm"]
    assert theirs["losses"][0] == pytest.approx(0.693147, abs=1e-6)
    assert theirs["losses"] == pytest.approx(plain["losses"], abs=2e-5)
    assert theirs["head"] == pytest.approx(plain["head"], rel=1e-4)
    assert plain["losses"][-1] < 0.69


def _train(path: Path, **options) -> dict:
    # The interpreter takes its time for every row.
    model = tiny.model(num_hidden_layers=1)
    run = trainer(path, 2, model, objective="dpo", num_train_epochs=2, optim="sgd", **options)
    run.train()
    models = (run.model, run.ref_model)
    return {
        "losses": [log["loss"] for log in step_logs(run)],
        "layers": sorted({model.model.norm._get_name() for model in models}),
        "head": weights(run.model)["lm_head.weight"].norm().item(),
    }


def _interpretable() -> None:
    """Make Liger's kernels run in Triton's interpreter, which lacks two things.

    Numbers passed as arguments have no `.to`, and libdevice's rsqrt is not there.
    """
    import liger_kernel.ops.rms_norm as norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(value):
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = converted
    norm.rsqrt = lambda x: 1 / tl.sqrt(x)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _interpretable()
    outcome = _train(Path(sys.argv[1]), use_liger_kernel=True)
    print(json.dumps(outcome))
