"""axolotl with prefkern's plugin, started by `axolotl train` on a tiny model, on a CPU.

axolotl pins every package that it needs, and is not among those of `make test`: `make test-axolotl`
installs it, in an environment of its own.
"""

from __future__ import annotations

import re
import tomllib
import types
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

pytest.importorskip("axolotl", reason="axolotl is not installed: make test-axolotl")

from axolotl.cli.config import load_cfg

from prefkern.integrations.axolotl import SUPPORTED, PrefkernPlugin
from prefkern.integrations.axolotl.arguments import PrefkernArgs
from support.axolotl_runs import CASES, PLUGIN, STEPS, Case, logged, ours, prepare, recipe, train
from support.training import assert_same_weights, transformers, weights

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
_OF_TIME = ("runtime", "per_second")


def test_what_axolotl_pins_is_within_our_bounds():
    """So that `pip install prefkern axolotl` finds versions for both."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = map(Requirement, (*project["dependencies"], *extras["train"], *extras["trl"]))
    pins = {}
    for each in map(Requirement, metadata.requires("axolotl") or ()):
        (pin,) = [x.version for x in each.specifier if x.operator == "=="] or [None]
        if pin is not None and each.marker is None:
            pins[each.name.lower()] = pin
    assert {"transformers", "trl", "peft", "accelerate", "datasets"} <= pins.keys()
    for bound in bounds:
        if bound.name in pins:
            assert bound.specifier.contains(pins[bound.name]), (bound, pins[bound.name])


def cfg(**entries):
    return {"plugins": [PLUGIN], "rl": "dpo", "prefkern": {"objective": "adadpo"}, **entries}


@pytest.mark.parametrize("name", CASES)
def test_trains_as_our_own_trainer(tmp_path, name):
    """Every number that both log, and the weights: in batches of 4, 3, 2 or all, in float32."""
    case = CASES[name]
    prepare(tmp_path)
    done = train(tmp_path, recipe(tmp_path, case))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run, logs = ours(tmp_path, case), logged(tmp_path)
    expected = [log for log in run.state.log_history if "loss" in log]
    assert len(logs) == len(expected) == STEPS
    assert len({round(log["loss"], 4) for log in logs}) == STEPS
    assert logs[0]["loss"] == pytest.approx(0.69314718, abs=1e-6)
    for mine, true in zip(logs, expected, strict=True):
        assert {"rewards/margins", "grad_norm", "num_tokens"} <= mine.keys() & true.keys()
        assert ("adaptive/beta_ratio" in mine) == (case.objective == "adadpo")
        for key in true.keys() & mine.keys():
            if not key.endswith(_OF_TIME):
                assert mine[key] == pytest.approx(true[key], rel=2e-5, abs=2e-5), key
    if not case.lora:
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert_same_weights(weights(saved), weights(run.model), atol=1e-5, rtol=1e-4)
    else:
        assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_the_pages_recipe(tmp_path):
    """What docs/axolotl.md prints is a configuration that axolotl accepts, with this trainer."""
    prepare(tmp_path)
    page = (ROOT / "docs/axolotl.md").read_text()
    (printed,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    given = recipe(tmp_path, Case("adadpo"))
    here = ("base_model", "datasets", "output_dir", "bf16", "fp16", "tf32", "device", "use_cpu")
    entries = {**yaml.safe_load(printed), **{name: given[name] for name in here}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(entries))
    loaded = load_cfg(str(tmp_path / "recipe.yaml"))
    assert loaded.trainer_cls.endswith("trainer.PrefkernDPOTrainer") and loaded.rl == "dpo"
    assert loaded.prefkern["objective"] == "adadpo" and loaded.prefkern["beta"] == 0.1
    assert loaded.lora_r == 16


def test_another_version_ends_the_run(tmp_path):
    """axolotl would print an ImportError and train plain DPO."""
    prepare(tmp_path)
    other = tmp_path / "other/axolotl-0.18.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: axolotl\nVersion: 0.18.0\n")
    done = train(tmp_path, recipe(tmp_path, Case("adadpo")), other.parent)
    assert done.returncode != 0 and not (tmp_path / "out/checkpoint-1").exists()
    assert f"supports axolotl {SUPPORTED}, but 0.18.0 is installed" in done.stderr


def test_another_trl_ends_the_run(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prefkern.integrations.trl", None)
    with pytest.raises(RuntimeError, match="prefkern cannot train here: .*prefkern.integrations"):
        PrefkernPlugin().register(cfg())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"prefkern": None},
            "prefkern is missing beside the plugin; set, for example, prefkern: {",
        ),
        ({"rl": "orpo"}, "rl is 'orpo', but the objectives of prefkern .* set rl: dpo"),
        ({"rl": None}, "rl is None"),
        ({"trainer_cls": "a.B"}, "trainer_cls is 'a.B', but prefkern brings its own trainer"),
    ],
)
def test_configurations_that_it_cannot_train(entries, message):
    with pytest.raises(ValueError, match=message):
        PrefkernPlugin().register(cfg(**entries))


def test_the_configuration_names_the_trainer_once():
    mine, others = cfg(), cfg(plugins=["a.Plugin"])
    for _ in range(2):
        PrefkernPlugin().register(mine)
    assert mine["trainer_cls"].endswith("trainer.PrefkernDPOTrainer")
    PrefkernPlugin().register(others)
    assert "trainer_cls" not in others


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"objective": "adadp"}, "unknown objective 'adadp'"),
        ({"objective": "adadpo", "clipp": 2.0}, "objective 'adadpo' has no option 'clipp'"),
        ({"objective": "adadpo", "beta": -1}, "beta"),
        ({"workspace_mb": "much"}, "workspace_mb"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(entry, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PrefkernArgs(prefkern=entry)


def test_a_trainer_of_another_plugin_is_noticed():
    given = types.SimpleNamespace(prefkern={"objective": "dpo"}, plugins=[PLUGIN, "a.Other"])
    with pytest.raises(RuntimeError, match=r"the trainer is int, which another .* a\.Other"):
        PrefkernPlugin().post_trainer_create(given, 3)
    PrefkernPlugin().post_trainer_create(types.SimpleNamespace(prefkern=None), 3)
