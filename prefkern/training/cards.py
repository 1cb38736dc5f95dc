"""Model cards: the README.md of a trained folder, in the form of TRL's.

A card says what the model was before, the data, the objective by its name with its papers, the
hyper-parameters and the versions, and shows how to generate with it. `CardTrainer` writes one into
every folder that it saves a model or an adapter to, in place of PEFT's blank one, and into the
output folder at each checkpoint, as TRL does; `push_to_hub` uploads it. A README.md that was not
generated is left alone.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from prefkern.data.columns import picture_column
from prefkern.models.adapters import is_peft_model
from prefkern.objectives import REGISTRY, Adaptive, Mixture, Objective
from prefkern.objectives.citations import ADADPO, LD_DPO, TR_DPO, Paper, without_repeats
from prefkern.objectives.composed import WPO, Wrapper
from prefkern.training.files import write_atomically
from prefkern.training.item_trainer import ItemTrainer
from prefkern.training.options import MOVING_REFERENCE
from prefkern.training.saving import (
    ADAPTERS,
    GENERATED,
    INDICES,
    README,
    WEIGHTS,
    is_generated,
)
from prefkern.version import VERSION

logger = logging.getLogger(__name__)

_QUESTION = (
    "If you had a time machine, but could only go to the past or the future once and never return, "
    "which would you choose and why?"
)
_ITSELF = f"""@software{{prefkern,
    title   = {{{{prefkern: memory-efficient exact preference training of language models}}}},
    author  = {{{{prefkern developers}}}},
    version = {{{VERSION}}},
    license = {{Apache-2.0}},
}}"""
# Fields of the arguments that every card lists, in this order, where they are set.
_LISTED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps"),
    *("max_length", "max_tokens_per_batch", "optim", "weight_decay", "max_grad_norm", "seed"),
)
_LISTED_OF_ADAPTERS = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules"),
    "modules_to_save",
)
_VERSIONS = {
    "TRL": "trl",
    "PEFT": "peft",
    "Transformers": "transformers",
    "Pytorch": "torch",
    "Datasets": "datasets",
    "Tokenizers": "tokenizers",
}


class CardTrainer(ItemTrainer):
    """ItemTrainer whose saved models carry a card; a subclass has a `loss_fn` with an objective."""

    loss_fn: Any
    # Name on the hub, or file, of the training data; None: its name on the hub, if datasets loaded
    # it from there.
    dataset_name: str | None = None
    # Packages that trained besides prefkern, by their names in `_VERSIONS`, with their addresses.
    _with_packages: ClassVar[Mapping[str, str]] = {}
    # Papers of these, after those of the objective.
    _more_papers: tuple[Paper, ...] = ()

    def create_model_card(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        *,
        language: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Write the output folder's README.md, as TRL's trainers do; rank 0 alone writes.

        Args:
            model_name: the name in its heading; None: the folder's, or the repository's.
            dataset_name: of the training data; None: `self.dataset_name`.
            tags: besides those of the objective.
            language, license: for the card's metadata.
        """
        if self.is_world_process_zero():
            self._write_card(
                Path(self.args.output_dir or "."),
                model_name=model_name,
                dataset_name=dataset_name,
                tags=tags,
                language=language,
                license=license,
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.args.should_save and self._holds_a_model(folder):
            self._write_card(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # As in TRL: what is pushed during training has a card, too.
        self.create_model_card()
        super()._save_checkpoint(model, trial)

    def _holds_a_model(self, folder: Path) -> bool:
        files = (*WEIGHTS, *ADAPTERS, *INDICES)
        return self.joining_command is not None or any((folder / name).exists() for name in files)

    def _write_card(self, folder: Path, **given: Any) -> None:
        path = folder / README
        if path.exists() and not is_generated(path):
            logger.info("%s was not generated: it stays as it is", path)
            return
        place = folder
        if self._staging is not None and folder.parent == self._staging:
            place = self._staging.parent / folder.name
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, str(self._card(place, **given)))

    def _card(
        self,
        folder: Path,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        language: Any = None,
        license: str | None = None,
    ) -> ModelCard:
        model: Any = self.accelerator.unwrap_model(self.model)  # pyright: ignore[reportCallIssue]
        objective = self.loss_fn.objective
        is_adapter = is_peft_model(model)
        base = base_name(model)
        base_id = base if is_hub_id(base) else None
        data = dataset_name or self.dataset_name or hub_name(self.train_dataset)
        sees = picture_column(getattr(self.train_dataset, "column_names", None) or ()) is not None
        hub_id = self.hub_model_id
        papers = without_repeats([*objective.citations(), *self._papers_of_options()])
        if model_name is None:
            model_name = hub_id.split("/")[-1] if hub_id else folder.resolve().name
        adapters = adapter_tags(model, base_id)
        given_tags = [tags] if isinstance(tags, str) else list(tags or ())
        card_data = ModelCardData(
            base_model=base_id,
            datasets=data if is_hub_id(data) else None,
            language=language,
            library_name="peft" if is_adapter else "transformers",
            license=license,
            model_name=model_name,
            pipeline_tag="image-text-to-text" if sees else "text-generation",
            tags=[*dict.fromkeys([GENERATED, *self._card_tags(), *adapters, *given_tags])],
        )
        return ModelCard.from_template(
            card_data,
            template_str=(resources.files("prefkern.training") / "model_card.md").read_text(
                "utf-8"
            ),
            model_name=model_name,
            kind="a fine-tuned version of" if not is_adapter else f"{_kind(model)} of",
            base=described_base(model, base),
            data=described_data(data, self.train_dataset, objective, sees),
            software=[*self._software()],
            quick_start=quick_start(
                hub_id or (str(folder) if not folder.is_absolute() else folder.name),
                is_adapter=is_adapter,
                has_base=bool(base),
                has_template=getattr(self.processing_class, "chat_template", None) is not None,
                sees=sees,
            ),
            badges=self._badges(),
            method=objective.title,
            papers=papers,
            introduced=introduced(papers),
            options=[(name, shown(value)) for name, value in self._options(objective, model)],
            versions=[("prefkern", VERSION), *_installed(self._with_packages, is_adapter)],
            citations=[
                *(
                    (each.title, each.bibtex)
                    for each in without_repeats([*papers, *self._more_papers])
                ),
                ("prefkern", _ITSELF),
            ],
        )

    def _papers_of_options(self) -> Iterator[Paper]:
        if self.loss_fn.ld_alpha is not None:
            yield LD_DPO
        if getattr(self.args, "sync_ref_model", False):
            yield TR_DPO

    def _card_tags(self) -> list[str]:
        return ["prefkern", *objective_tags(self.loss_fn.objective)]

    def _software(self) -> Iterator[str]:
        yield "prefkern"
        for name, address in self._with_packages.items():
            yield f"[{name}]({address})"

    def _badges(self) -> list[str]:
        """Links to the run in trackers that have one open."""
        run = getattr(sys.modules.get("wandb"), "run", None)
        return [] if run is None else [f"[The run in Weights & Biases]({run.url})"]

    def _options(self, objective: Any, model: Any) -> Iterator[tuple[str, Any]]:
        yield "objective", objective.title
        yield from objective_options(objective)
        args: Any = self.args
        if self.loss_fn.ld_alpha is not None:
            yield "ld_alpha", self.loss_fn.ld_alpha
        for name in ("assistant_only_loss", "last_turn_only"):
            if getattr(args, name, False):
                yield name, True
        if getattr(args, "sync_ref_model", False):
            yield "sync_ref_model", True
            yield from ((name, getattr(args, name)) for name in MOVING_REFERENCE)
        for name in _LISTED:
            value = getattr(args, name, None)
            # Where max_steps is set, not -1, no epochs count.
            without = "num_train_epochs" if args.max_steps > 0 else "max_steps"
            if value is not None and name != without:
                yield name, getattr(value, "value", value)
        if getattr(args, "max_tokens_per_batch", None) is None:
            yield "total_train_batch_size", self.get_total_train_batch_size(args)
        for name in ("bf16", "fp16"):
            if getattr(args, name):
                yield name, True
        if is_peft_model(model):
            config = model.peft_config[model.active_adapter]
            for name in _LISTED_OF_ADAPTERS:
                value = getattr(config, name, None)
                if isinstance(value, set | list | tuple):
                    # "all-linear" has become the full name of every layer.
                    value = sorted({each.split(".")[-1] for each in value})
                if value is not None and value is not False:
                    yield name, value


def is_hub_id(name: str | None) -> bool:
    """Whether a name is one of the hub's, and not of a folder or file here."""
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_name(dataset: Any) -> str | None:
    """The name on the hub of a dataset that `datasets` loaded from there, else None.

    Its cache has a folder "owner___name" for it.
    """
    for file in getattr(dataset, "cache_files", None) or ():
        for part in Path(file["filename"]).parts if isinstance(file, dict) else ():
            owner, separator, name = part.partition("___")
            if separator:
                return f"{owner}/{name}"
    return None


def base_name(model: Any) -> str:
    """The name or folder of the model before training; empty if it was made in memory."""
    return getattr(model.config, "_name_or_path", "") or ""


def described_base(model: Any, name: str) -> str:
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    kind = f"a `{model.config.model_type}` model"
    return f"`{Path(name).name}`, {kind}" if name else f"{kind} that was made in memory"


def described_data(name: str | None, dataset: Any, objective: Any, sees: bool = False) -> str:
    if dataset is None:
        return ""
    items = "pairs" if isinstance(objective, Objective) else "responses"
    items += " with pictures" if sees else ""
    size = f"{len(dataset):,} {items}" if hasattr(dataset, "__len__") else items
    if name is None:
        return size
    if is_hub_id(name):
        return f"{size} of [{name}](https://huggingface.co/datasets/{name})"
    return f"{size} of `{Path(name).name}`"


def objective_tags(objective: Any) -> list[str]:
    """ "dpo" for DPO; "dpo" and "adadpo" for AdaDPO; "simpo", "adasimpo", "adadpo" for AdaSimPO."""
    if isinstance(objective, Mixture):
        return [
            *dict.fromkeys(tag for part in objective.objectives for tag in objective_tags(part))
        ]
    if isinstance(objective, Wrapper):
        own = "wpo" if isinstance(objective, WPO) else "rpo"
        return [*objective_tags(objective.objective), own]
    kind = type(objective)
    name = next((name for name, cls in REGISTRY.items() if cls is kind), kind.__name__.lower())
    if getattr(objective, "adaptive", None) is None:
        return [name]
    return [*dict.fromkeys([name, f"ada{name}", "adadpo"])]


def objective_options(objective: Any) -> Iterator[tuple[str, Any]]:
    """The options of an objective with their values; of a mixture, those of each under its name."""
    if isinstance(objective, Mixture):
        yield "loss_weights", objective.loss_weights
        for part in objective.objectives:
            for name, value in objective_options(part):
                yield f"{part.title}.{name}", value
        return
    if isinstance(objective, Wrapper):
        yield from objective_options(objective.objective)
    for name in inspect.signature(type(objective)).parameters:
        value = getattr(objective, name)
        if isinstance(value, Objective | None):
            continue
        if isinstance(value, Adaptive):
            yield from vars(value).items()
        else:
            yield name, value


def introduced(papers: Iterable[Paper]) -> str:
    """ "a method introduced in [paper]", of AdaDPO with that of its loss."""
    links = [f"[{each.title}]({each.link})" for each in papers]
    if not links:
        return ""
    first, *others = links
    text = f"a method introduced in {first}"
    if others:
        of_loss = next(iter(papers)) == ADADPO
        text += (", on the loss of " if of_loss else ", with ") + " and ".join(others)
    return text


def adapter_tags(model: Any, base_id: str | None) -> list[str]:
    if not is_peft_model(model):
        return []
    kind = model.peft_config[model.active_adapter].peft_type
    of_base = [] if base_id is None else [f"base_model:adapter:{base_id}"]
    return [str(getattr(kind, "value", kind)).lower(), *of_base]


def quick_start(
    place: str, *, is_adapter: bool, has_base: bool, has_template: bool, sees: bool = False
) -> str:
    """Code that generates with the model in a folder or of that name on the hub."""
    asked = '[{"role": "user", "content": question}]' if has_template else "question"
    task, kind, reader, question = "text-generation", "CausalLM", "tokenizer", f'"{_QUESTION}"'
    if sees:
        task, kind, reader = "image-text-to-text", "ImageTextToText", "processor"
        question = (
            '[{"type": "image", "url": "picture.png"}, {"type": "text", "text": "What is this?"}]'
        )
        asked = 'text=[{"role": "user", "content": question}]'
    place = json.dumps(place)
    imports, loaded = "from transformers import pipeline", f"model={place}"
    before = ""
    if is_adapter and not has_base:
        # The adapter's config names no base that could be loaded.
        imports = (
            "from peft import PeftModel\n"
            f"from transformers import AutoModelFor{kind}, Auto{reader.title()}, pipeline"
        )
        before = (
            f'base = AutoModelFor{kind}.from_pretrained("...")  # the model before training\n'
            f"model = PeftModel.from_pretrained(base, {place})\n"
            f"{reader} = Auto{reader.title()}.from_pretrained({place})\n"
        )
        loaded = f"model=model, {reader}={reader}"
    return (
        f"{imports}\n\n"
        f"question = {question}\n"
        f"{before}"
        f'generator = pipeline("{task}", {loaded})\n'
        f"output = generator({asked}, max_new_tokens=128, return_full_text=False)[0]\n"
        'print(output["generated_text"])'
    )


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple | set):
        return ", ".join(shown(each) for each in value)
    return str(value).replace("|", "\\|")


def _kind(model: Any) -> str:
    kind = model.peft_config[model.active_adapter].peft_type
    name = "LoRA" if kind == "LORA" else str(getattr(kind, "value", kind))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name} adapter"


def _installed(used: Iterable[str], is_adapter: bool) -> Iterator[tuple[str, str]]:
    for name, package in _VERSIONS.items():
        if name == "TRL" and name not in used or name == "PEFT" and not is_adapter:
            continue
        yield name, metadata.version(package)
