"""A model's tokenizer comes from the model's revision, and its own code runs only if allowed."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest

from support import tiny

pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from prefkern import PreferenceTrainer
from prefkern.cli import __main__ as cli
from prefkern.cli import plan
from prefkern.models.loading import load_own_tokenizer
from prefkern.training import rewards
from support.training import config, lora

ROOT = Path(__file__).parent.parent.parent
REVISIONS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, saved, monkeypatch) -> Path:
    """A cache of the hub with two revisions; their tokenizers have two words exchanged."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tmp_path / "hub/models--acme--tiny"
    (model / "refs").mkdir(parents=True)
    for name, commit in REVISIONS.items():
        shutil.copytree(saved, model / "snapshots" / commit)
        (model / "refs" / name).write_text(commit)
    file = model / "snapshots" / REVISIONS["main"] / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    for word, other in zip(tiny.WORDS[::2], tiny.WORDS[1::2], strict=True):
        words[word], words[other] = words[other], words[word]
    file.write_text(json.dumps(tokenizer))
    template = file.parent / "chat_template.jinja"
    template.write_text(template.read_text() + "<unk>")
    return tmp_path / "hub"


@pytest.fixture
def with_code(saved, tmp_path, monkeypatch) -> Path:
    """A folder whose tokenizer has its own code; a prompt for permission is answered with yes."""
    marker = tmp_path / "executed"
    (saved / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(marker)!r}, 'a').write('x')\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    file = saved / "tokenizer_config.json"
    described = json.loads(file.read_text())
    described.update(auto_map={"AutoTokenizer": [None, "own.Own"]}, tokenizer_class="Own")
    file.write_text(json.dumps(described))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return marker


def _trainer(model, folder: Path, **options) -> PreferenceTrainer:
    return PreferenceTrainer(model, config(folder, **options), tiny.dataset(4))


def test_the_tokenizer_is_of_the_model_s_revision(cache, tmp_path):
    for name in REVISIONS:
        source = {"revision": name, "cache_dir": str(cache), "local_files_only": True}
        trainer = _trainer("acme/tiny", tmp_path / "out", model_init_kwargs=source)
        found = trainer.processing_class
        is_changed = name == "main"
        assert found("good bad")["input_ids"] == ([6, 5] if is_changed else [5, 6])
        assert found.chat_template.endswith("<unk>") == is_changed
        assert (
            rewards.new_reward_model("acme/tiny", **source)[1]("good bad")["input_ids"]
            == (found("good bad")["input_ids"])
        )


@pytest.mark.parametrize("beside", [True, False])
def test_the_tokenizer_is_of_the_model_s_subfolder(saved, cache, tmp_path, beside):
    """And the one above it where the subfolder has none; in a folder, and on the hub."""
    for commit in REVISIONS.values():
        snapshot = cache / "models--acme--tiny/snapshots" / commit
        shutil.copytree(saved, snapshot / "inner")
    shutil.copytree(cache / "models--acme--tiny/snapshots" / REVISIONS["main"], tmp_path / "all")
    for folder in (tmp_path / "all", *(cache / "models--acme--tiny/snapshots").iterdir()):
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
        for file in () if beside else (folder / "inner").glob("*token*"):
            file.unlink()
    cached = {"cache_dir": str(cache), "local_files_only": True}
    for name, where in ((str(tmp_path / "all"), {}), ("acme/tiny", cached)):
        source = {"subfolder": "inner", **where}
        found = _trainer(name, tmp_path / "out", model_init_kwargs=source).processing_class
        # The tokenizer above has two words exchanged.
        assert found("good bad")["input_ids"] == ([5, 6] if beside else [6, 5])
        assert found.chat_template.endswith("<unk>") != beside
        scorer = rewards.new_reward_model(name, **source)[1]
        assert scorer("good bad")["input_ids"] == found("good bad")["input_ids"]


def test_an_adapter_is_not_in_the_model_s_subfolder(saved, tmp_path):
    """Its own tokenizer is beside it."""
    (tmp_path / "all").mkdir()
    shutil.copytree(saved, tmp_path / "all/inner")
    adapter = tmp_path / "adapter"
    source = {"subfolder": "inner"}
    first = PreferenceTrainer(
        str(tmp_path / "all"),
        config(adapter, model_init_kwargs=source, max_steps=1),
        train_dataset=tiny.dataset(4),
        peft_config=lora(),
    )
    first.processing_class.chat_template += "<unk>"
    first.save_model()
    loaded = load_own_tokenizer(str(adapter), str(tmp_path / "all"), source)
    assert loaded.chat_template.endswith("<unk>")


def test_the_reference_s_words_are_of_its_revision(cache, saved, tmp_path):
    """The policy is a folder without revisions; the reference has another revision."""
    shared = {"cache_dir": str(cache), "local_files_only": True}
    for name in REVISIONS:
        options = {
            "model_init_kwargs": {**shared, "revision": name},
            "ref_model_name_or_path": "acme/tiny",
        }
        if name == "v1":
            _trainer(str(saved), tmp_path / "out", **options)
            continue
        with pytest.raises(ValueError, match="'acme/tiny' has another vocabulary than the model"):
            _trainer(str(saved), tmp_path / "out", **options)


def test_code_of_a_tokenizer_is_not_run_unasked(with_code, saved, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in tiny.pairs(8)))
    pairs = tmp_path / "pairs.jsonl"
    argv = ["train", "--model", str(saved), "--dataset", str(pairs), "--use_cpu", "true"]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "cli")]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    with pytest.raises(ValueError, match="trust_remote_code"):
        _trainer(str(saved), tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        _trainer(tiny.model().from_pretrained(saved), tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        rewards.new_reward_model(str(saved))
    # Of a reference the tokenizer is compared alone, and without one there is nothing to compare.
    plain = tmp_path / "plain"
    tiny.model().save_pretrained(plain)
    tiny.tokenizer().save_pretrained(plain)
    _trainer(str(plain), tmp_path / "out", ref_model_name_or_path=str(saved))
    assert not with_code.exists()


def test_code_of_a_tokenizer_runs_where_it_is_trusted(with_code, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks all the same"))
    trainer = _trainer(
        str(saved), tmp_path / "out", model_init_kwargs={"trust_remote_code": True},
        ref_model_name_or_path=str(saved),
    )  # fmt: skip
    assert type(trainer.processing_class).__name__ == "Own" and with_code.exists()
    tokenizer = rewards.new_reward_model(str(saved), trust_remote_code=True)[1]
    assert type(tokenizer).__name__ == "Own"


def test_code_of_a_model_is_not_run_by_plan(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    marker = tmp_path / "executed"
    (saved / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C:\n    pass\nM = C\n")
    described = json.loads((saved / "config.json").read_text())
    described["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (saved / "config.json").write_text(json.dumps({**described, "model_type": "evil"}))
    for call in (plan.empty_model, rewards.load_reward_model, rewards.new_reward_model):
        with pytest.raises(ValueError, match="trust_remote_code"):
            call(str(saved))
    with pytest.raises(ValueError, match="trust_remote_code"):
        _trainer(str(saved), tmp_path / "out")
    assert not marker.exists()


def _loads() -> list[tuple[str, ast.Call]]:
    """Calls of `from_pretrained` and `from_config` of Auto classes and of classes that hold one."""
    found = []
    for path in sorted((ROOT / "prefkern").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value).split(".")[-1]
            is_auto = owner.startswith("Auto") or owner == "loader"
            if is_auto and node.func.attr in ("from_pretrained", "from_config"):
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_every_load_says_whether_code_is_trusted():
    loads = _loads()
    assert len(loads) >= 5
    silent = [
        where
        for where, call in loads
        if "trust_remote_code" not in [keyword.arg for keyword in call.keywords]
    ]
    assert not silent
