"""TRL's DPO with AdaDPO's objective and without logits: two changed lines compared with plain TRL.

    from trl import DPOConfig                                  # from trl import DPOConfig, DPOTrainer
    from prefkern.integrations.trl import DPOTrainer           # line 1
    trainer = DPOTrainer(..., objective="adadpo")              # line 2

Everything else is TRL's: datasets, chat templates, PEFT, checkpoints, logging. `--objective` takes
any name in `prefkern.objectives.names()` whose objective is on pairs.

    python examples/trl_dpo.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized
    python examples/trl_dpo.py --model folder --dataset pairs.jsonl --objective dpo
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig

from prefkern.integrations.trl import DPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a model's folder or hub name")
    parser.add_argument("--dataset", required=True, help="a hub name, or a JSONL file of pairs")
    parser.add_argument("--objective", default="adadpo", help="(default: %(default)s)")
    parser.add_argument("--beta", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--output", default="out", help="(default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=-1, help="(default: one epoch)")
    parser.add_argument("--use_cpu", action="store_true", help="even if there is a GPU")
    given = parser.parse_args()

    if Path(given.dataset).suffix == ".jsonl":
        dataset = load_dataset("json", data_files=given.dataset, split="train")
    else:
        dataset = load_dataset(given.dataset, split="train")
    trainer = DPOTrainer(
        given.model,
        args=DPOConfig(
            given.output,
            beta=given.beta,
            learning_rate=1e-5,
            num_train_epochs=1,
            max_steps=given.max_steps,
            use_cpu=given.use_cpu,
            report_to="none",
        ),
        train_dataset=dataset,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        objective=given.objective,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
