"""PreferenceTrainer: transformers' Trainer on preference pairs, with no logits in memory.

A step computes the reference's log-prob sums of the batch, unless the dataset carries them. Then it
runs the policy's wrapped forward, with `FusedPreferenceLoss` in place of the output head, and one
backward. Policy and reference go through the same code, dtype and summation, so that equal models
give a DPO loss of ln 2.

The loss is the mean over the pairs of an optimiser step, as `prefkern.training.item_trainer` counts
them. Numbers that an objective takes from a whole batch (running statistics, beta-DPO's beta and
draws, KTO's reference point) are of one forward batch, over all ranks, accumulated or not. Metrics
have TRL's names and are means over pairs (or tokens) since the last log, over all ranks.

The reference is one of: `ref_model`; for PEFT, the adapter switched off, another adapter, or the
initial values of a trained adapter that was given; sums from the dataset, or computed once before
training (`precompute_ref_log_probs`, kept by `prefkern.training.reference_cache`); else a copy of
the initial model. A model of its own may follow the policy (`prefkern.training.moving_reference`).
"""

from __future__ import annotations

import logging
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PredictionOutput

from prefkern.data import (
    DatasetReport,
    tokenize_preferences,  # noqa: F401  # imported first: without the extra it says what to install
)
from prefkern.data.collate import (
    ExampleCollator,
    PreferenceCollator,
)
from prefkern.data.columns import ID_COLUMNS
from prefkern.loss.outputs import PreferenceOutput, UnpairedOutput
from prefkern.models.adapters import (
    BASE,
    adapt,
    check_reference_adapter,
    check_unmerged,
    disable_dropout,
    is_peft_model,
    is_trained_adapter,
    with_own_rates,
)
from prefkern.models.heads import find_head, has_low_rank_term, unwrap
from prefkern.models.liger import apply_liger, check_liger
from prefkern.models.loading import load_model, load_tokenizer
from prefkern.models.own_reference import ALTERNATIVES, InitialAdapter
from prefkern.models.packing import (
    WHOLE_ROW,
    reads_whole_row,
    require_packing,
    require_shared_router_loss,
)
from prefkern.models.routers import RouterLoss
from prefkern.models.scoring import (
    preference_outputs,
)
from prefkern.models.text_inputs import embedding_rows
from prefkern.models.transform import head_transform
from prefkern.models.vocabulary import check_pad_token, check_reference_words, check_tokens
from prefkern.objectives import Objective, UnpairedObjective
from prefkern.training.checks import (
    Needs,
    carry_sums,
    check_batches,
    check_data_arguments,
    check_needs,
    check_reference_arguments,
    given_objective,
    named,
    reference_arguments,
)
from prefkern.training.config import PreferenceConfig
from prefkern.training.context_parallel import check_context_parallel, size_of_launch
from prefkern.training.data_trainer import DataTrainer
from prefkern.training.moving_reference import (
    MovesReference,
    check_can_follow,
    load_reference,
    refuse_moved_reference,
    save_reference,
)
from prefkern.training.names import NamedArguments
from prefkern.training.pictures import (
    picture_collator,
    picture_processor,
    read_whole,
    shows_pictures,
)
from prefkern.training.reference_setup import check_reference_of_shards, second_copy
from prefkern.training.samples import ShowsSamples, check_samples
from prefkern.training.sharding import mode_of, sharded
from prefkern.training.streams import check_resumed_stream, check_stream, save_stream
from prefkern.training.tensor_parallel import (
    adapting,
    check_summed_gradients,
    check_tensor_parallel,
    complete_adapter,
    counting_batches_once,
    size_of,
    with_parallelism,
)
from prefkern.training.zero import check_zero, gather_whole

logger = logging.getLogger(__name__)


class PreferenceTrainer(NamedArguments, DataTrainer):
    """Trains a causal LM on preference pairs.

    Args:
        model: a Hugging Face causal LM, a PEFT model of one, or a name or path to load.
        args: a `PreferenceConfig`.
        train_dataset, eval_dataset: `datasets.Dataset` in one of the formats of `prefkern.data`, or
            a `DatasetMix` of several; the latter may also be a dict of them. Each may be a stream
            (`datasets.IterableDataset`): trained on with `max_steps`, read whole for evaluations.
        processing_class: the tokenizer, or the processor for rows with pictures; None loads the
            model's own.
        objective: overrides `args.objective`.
        ref_model: the reference, a model, name or path. None: the initial model. With PEFT that is
            the base model if the adapter is new, and a frozen copy of the adapter if a trained one
            is given. Else a copy of the model, which costs its memory unless
            `precompute_ref_log_probs` is set.
        peft_config: adapts `model` with PEFT.
        callbacks, optimizers, data_collator: as in transformers' Trainer.

    Attributes:
        dataset_reports: `DatasetReport` of each dataset by name ("train", "eval", ...).

    Raises ValueError for datasets, heads and arguments that it cannot train with, and TypeError for
    a model, arguments or a dataset of another type.
    """

    _places: ClassVar = {each.name: "it to PreferenceConfig" for each in fields(PreferenceConfig)}

    args: PreferenceConfig

    def __init__(
        self,
        model: Any,
        args: PreferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        objective: Objective | UnpairedObjective | None = None,
        ref_model: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        data_collator: Any = None,
    ) -> None:
        args = args if args is not None else PreferenceConfig()
        if not isinstance(args, PreferenceConfig):
            raise TypeError(f"args must be a PreferenceConfig, got {type(args).__name__}")
        if not isinstance(model, str | nn.Module):
            raise TypeError(
                f"model must be a causal LM, or a name or path to load, got {type(model).__name__}"
            )
        check_data_arguments(args, train_dataset, data_collator)
        if isinstance(ref_model, nn.Module) and unwrap(ref_model) is unwrap(model):
            raise ValueError(
                "ref_model is the model that is trained; pass None to have a copy made, or a copy"
            )
        check_reference_arguments(model, ref_model, args)
        streams = check_stream(args, train_dataset)
        if streams is not None:
            # What is checked and reported before training; the others are as they are read.
            train_dataset = streams.first
        eval_dataset = read_whole(eval_dataset, "eval")
        seed = args.seed if objective is None else None
        objective = (
            args.build_objective() if objective is None else given_objective(objective, args)
        )
        self._make_losses(objective, args.workspace_mb, args.backend, seed, args.ld_alpha)
        is_paired = isinstance(objective, Objective)
        self._objective_needs = Needs(
            paired=is_paired,
            reference=objective.needs_reference,
            margins=is_paired and objective.needs_reward_margins,
            distributions=is_paired and objective.needs_kls,
            gold=is_paired and objective.needs_gold,
        )
        check_needs(self._objective_needs, args, ref_model)
        self._reference_given = reference_arguments(args, ref_model)
        # Datasets whose sums were computed here, by fingerprint.
        self._computed_sums: set[str] = set()
        # Of the reference, before it is sharded (rank 0), and what computes sums before training.
        self._described: dict[str, Any] | None = None
        self._for_sums: nn.Module | None = None
        for name, dataset in named(train_dataset, "train") + named(eval_dataset, "eval"):
            self._check_columns(dataset, args, name)
        if args.sync_ref_model and mode_of(args) is not None:
            raise ValueError(
                f"sync_ref_model is not supported yet under {mode_of(args)}, which shards weights; "
                "train under DDP, or leave it out"
            )
        check_reference_of_shards(args, self._objective_needs, train_dataset, eval_dataset)
        check_samples(args, eval_dataset)
        check_zero(args)
        check_liger(args, args.device)
        # Trainer seeds as well, but an adapter's initial weights are drawn before that.
        set_seed(args.seed)
        own: Any = args.model_init_kwargs or {}
        init_kwargs = with_parallelism(own, args, model)
        given_reference = ref_model if ref_model is not None else args.ref_model_name_or_path
        check_tensor_parallel(args, model, given_reference, peft_config, init_kwargs)
        check_context_parallel(args)
        # It is not known how a model that is given was loaded.
        own_kwargs = init_kwargs if isinstance(model, str) else {}
        parts = named(train_dataset, "train") + named(eval_dataset, "eval")
        seen = shows_pictures(parts)
        if seen is not None:
            processing_class = picture_processor(processing_class, model, own_kwargs, args, seen)
        name = model if isinstance(model, str) else None
        model = load_model(model, init_kwargs) if isinstance(model, str) else model
        processing_class = processing_class or load_tokenizer(
            model.config._name_or_path, own_kwargs
        )
        tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        if not hasattr(tokenizer, "pad_token_id"):
            raise TypeError(
                f"processing_class must be a tokenizer or a processor, got {processing_class!r}"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        pad_token_id: int | None = tokenizer.pad_token_id
        if pad_token_id is None:
            raise ValueError("the tokenizer has neither a pad nor an eos token; set pad_token")
        with adapting(model, peft_config):
            model = adapt(
                model,
                peft_config,
                disable_dropout=args.disable_dropout,
                gradient_checkpointing=args.gradient_checkpointing,
            )
        check_unmerged(model)
        complete_adapter(model, None if peft_config is None else args.seed)
        find_head(model)
        base = unwrap(model)
        self._rows = embedding_rows(base)
        if not args.padding_free:
            check_pad_token(tokenizer, self._rows)
        self._router_loss = RouterLoss.of(model, args.router_aux_loss_coef)

        self._tokenizer, self._processor = tokenizer, processing_class
        self.dataset_reports: dict[str, DatasetReport] = {}
        with args.main_process_first(desc="tokenisation", local=False):
            train_dataset = self._tokenized(train_dataset, args, "train")
            eval_dataset = self._tokenized(eval_dataset, args, "eval")
        # The dataset does not tell what the user's own collator makes of it.
        self._collates_otherwise = data_collator is not None
        self._check_positions(train_dataset, args, "train", base)
        self._check_positions(eval_dataset, args, "eval", base)
        check_summed_gradients(model, args)
        ranks = self._ranks_with_batches = args.world_size // size_of(model) // size_of_launch(args)
        gold = self._objective_needs.gold
        if streams is None:
            check_batches(
                train_dataset, args.train_batch_size, args, "train", ranks, gold=gold, trains=True
            )
        else:
            streams.rename(self.dataset_reports)
        check_batches(eval_dataset, args.eval_batch_size, args, "eval", ranks, gold=gold)
        self._dropout_of_configs = disable_dropout(model) if args.disable_dropout else []
        # Sums are not enough for distributions or for mismatched pairs.
        carried = self._objective_needs.sums_suffice and carry_sums(train_dataset, eval_dataset)
        ref_model = given_reference
        ref_name = ref_model if isinstance(ref_model, str) else None
        if isinstance(ref_model, str):
            ref_model = load_model(ref_model, {"dtype": model.dtype, **init_kwargs}, "ref_model")
        if ref_model is not None:
            find_head(ref_model)
            models = (unwrap(model), unwrap(ref_model))
            check_reference_words(tokenizer, *models, ref_name, init_kwargs)
            for each, part in named(train_dataset, "train") + named(eval_dataset, "eval"):
                check_tokens(part, ID_COLUMNS, embedding_rows(unwrap(ref_model)), each, "reference")
                self._check_positions(part, args, each, unwrap(ref_model), "reference")
        is_adapted = is_peft_model(model)
        if is_adapted and args.sync_ref_model:
            raise ValueError(
                "sync_ref_model moves a reference model of its own to the policy's weights, and with "
                "an adapter these are the base's and the adapter's; leave it out, or train all "
                "weights"
            )
        needs_reference = objective.needs_reference
        self._initial_adapter: InitialAdapter | None = None
        is_given = is_adapted and peft_config is None
        is_free = ref_model is None and args.ref_adapter_name is None
        if needs_reference and is_given and is_free and is_trained_adapter(model):
            self._initial_adapter = InitialAdapter(model)
        self._has_sums = carried or args.precompute_ref_log_probs
        if needs_reference and not carried:
            check_reference_adapter(model, args.ref_adapter_name, ref_model, self._initial_adapter)
            if self._initial_adapter is not None:
                logger.warning(
                    "the reference is a frozen copy of the adapter that was given (for the base "
                    "model, set ref_adapter_name=%r)",
                    BASE,
                )
        has_reference = ref_model is not None or carried or is_adapted
        if needs_reference and not has_reference and not args.precompute_ref_log_probs:
            ref_model = second_copy(model, name, init_kwargs)
        casts = [name for name in ("bf16_full_eval", "fp16_full_eval") if getattr(args, name)]
        is_cast_too = is_adapted and ref_model is None
        is_cast_too = is_cast_too and not (carried or args.precompute_ref_log_probs)
        if needs_reference and casts and not is_cast_too:
            raise ValueError(
                f"{casts[0]} casts the policy and not its reference, so that rewards would be "
                "differences of two precisions; leave it out, or train with bf16"
            )
        if args.neftune_noise_alpha is not None and needs_reference and is_cast_too:
            raise ValueError(
                f"neftune_noise_alpha={args.neftune_noise_alpha} adds its noise to the reference as "
                "well, which goes through the policy's own embeddings; set precompute_ref_log_probs, "
                "or leave it out"
            )
        self.ref_model = ref_model
        apply_liger(args, *(each for each in (model, ref_model) if each is not None))
        layout = (pad_token_id, args.pad_to_multiple_of)
        collator = (
            PreferenceCollator(
                *layout,
                padding_free=args.padding_free,
                share_prompt=args.share_prompt,
                gold=gold,
            )
            if is_paired
            else ExampleCollator(*layout, args.max_length, padding_free=args.padding_free)
        )

        if seen is not None:
            collator = picture_collator(collator, processing_class, base)
        if streams is not None:
            seed = args.seed if args.data_seed is None else args.data_seed
            tokens = partial(self._tokens_of_stream, args, base)
            train_dataset = streams.tokenised(tokens, args.columns, not is_paired, seed)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._sequences_an_item = objective.responses
        # A sharded model has its weights only once it is wrapped: the first batch checks it.
        will_shard = self.is_deepspeed_enabled or self.is_fsdp_enabled
        for each in (self.model, self.ref_model) if is_deepspeed_zero3_enabled() else ():
            if each is not None:
                gather_whole(find_head(each)[1])  # pyright: ignore[reportArgumentType]
        if not will_shard:
            # Under the run's autocast: without it, a float32 head refuses bf16 hidden states.
            with self.accelerator.autocast():
                head_transform(self.model)  # pyright: ignore[reportArgumentType]
                if args.padding_free:
                    self._require_packing(self.model)
        if args.padding_free and not will_shard and self._reads_whole_row():
            logger.warning(WHOLE_ROW)
        self._warned_of_no_mismatch = False

        if self.ref_model is not None:
            if args.disable_dropout:
                disable_dropout(self.ref_model)
            self.ref_model.requires_grad_(False).eval()
            if not (self._shards_reference or hasattr(self.ref_model, "hf_device_map")):
                self.ref_model.to(args.device)  # pyright: ignore[reportCallIssue]
            if not will_shard:
                with self.accelerator.autocast():
                    head_transform(self.ref_model)
                    if args.padding_free:
                        self._require_packing(self.ref_model)
        if args.generate_samples:
            self.add_callback(ShowsSamples(self))
        if args.sync_ref_model:
            check_can_follow(self.ref_model, self.model)  # pyright: ignore[reportArgumentType]
            self.add_callback(MovesReference(self))
        if needs_reference and not carried and args.ref_adapter_name in (None, BASE):
            self._unsaved = {**(self._unsaved or {}), "reference": self._reference_fingerprint()}
        if self.ref_model is not None and self._shards_reference:
            if args.precompute_ref_log_probs and self.is_world_process_zero():
                self._description()
            self.ref_model = sharded(self.ref_model, self.accelerator)
        if needs_reference and args.precompute_ref_log_probs:
            with self._computing_sums():
                self.train_dataset = self._with_reference(self.train_dataset)
                self.eval_dataset = self._with_reference(self.eval_dataset)

    def _reads_whole_row(self) -> bool:
        model: Any = self.model
        return reads_whole_row(model, shares=self.args.share_prompt)

    def _require_packing(self, model: Any) -> None:
        require_packing(model, shares=self.args.share_prompt)
        if self.args.share_prompt and self._router_loss.coefficient:
            require_shared_router_loss(model)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics on a dataset, which may be raw pairs; see transformers' Trainer."""
        if isinstance(eval_dataset, str):
            known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if eval_dataset not in known:
                raise ValueError(
                    "eval_dataset must be a dataset, or the name of one of those given "
                    f"({', '.join(known) or 'none by name'}), got {eval_dataset!r}"
                )
        # A string names one of the datasets given to the constructor.
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # pyright: ignore[reportArgumentType]

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """As `evaluate`, in the form of Trainer's `predict`: metrics alone, without predictions."""
        if test_dataset is None:
            raise TypeError("test_dataset must be a dataset, got None")
        test_dataset = self._prepared(test_dataset, metric_key_prefix)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _preference_outputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[PreferenceOutput | UnpairedOutput, Tensor]:
        """The loss, computed inside the policy's forward, and the scalar to differentiate."""
        needs = self._objective_needs
        if self.accelerator.is_fsdp2:
            # FSDP2 notes at the first forward what is trained: with the adapter off, that is nothing.
            head_transform(model)
        options: dict[str, Any] = {"return_stats": self.args.token_metrics}
        # A dataset may carry sums and margins that this objective does not use.
        if needs.distributions:
            options |= self._reference_states(model, inputs)
        elif needs.reference:
            ref_logps = inputs.get("ref_logps")
            options["ref_logps"] = self._reference_logps(inputs) if ref_logps is None else ref_logps
        if needs.margins:
            options["reward_margins"] = inputs.get("reward_margins")
        if not needs.paired:
            options["desirable"] = inputs["desirable"]
            options["mismatched_log_ratios"] = self._mismatched_log_ratios(model, inputs)
        self.loss_fn.train(model.training)
        with counting_batches_once(self.accelerator):
            outputs = preference_outputs(
                model, inputs, self.loss_fn, router_loss=self._router_loss, **options
            )
        return outputs, outputs.loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_stream(self.train_dataset, output_dir)
        if self.args.sync_ref_model and self.args.should_save:
            save_reference(self.ref_model, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            check_resumed_stream(self.train_dataset, checkpoint, not self.args.ignore_data_skip)
            self._load_reference(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        # A checkpoint of weights alone has no reference.
        if best is not None and not self.args.save_only_model:
            self._load_reference(best)

    def _load_reference(self, checkpoint: str) -> None:
        if self.args.sync_ref_model:
            load_reference(self.ref_model, checkpoint)
        else:
            refuse_moved_reference(checkpoint)

    def _save_into(self, folder: str, state_dict: Any) -> None:
        with with_own_rates(self._dropout_of_configs):
            super()._save_into(folder, state_dict)

    def _refuse_unsupported_setups(self) -> None:
        super()._refuse_unsupported_setups()
        ref_model = self.ref_model if self._objective_needs.distributions else None
        if ref_model is not None and has_low_rank_term(find_head(ref_model)[1]):
            raise ValueError(
                "TDPO does not support LoRA on the reference's output head; give the ref_model "
                "that merge_and_unload() makes"
            )
        is_copied = self._initial_adapter is not None
        head = find_head(self.model)[1]  # pyright: ignore[reportArgumentType]
        if is_copied and self._objective_needs.distributions and has_low_rank_term(head):
            raise ValueError(
                "TDPO does not support LoRA on the reference's output head, and the reference is a "
                "copy of the adapter that was given: merge it (merge_and_unload) and give a "
                f"peft_config, or set ref_adapter_name={BASE!r}"
            )
        if is_copied and is_deepspeed_zero3_enabled() and not self._has_sums:
            raise ValueError(
                "a copy of a trained adapter is not supported as the reference yet under ZeRO-3: "
                f"{ALTERNATIVES}"
            )
