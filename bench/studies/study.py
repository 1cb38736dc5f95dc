"""The study as a whole: its settings, the data that runs share, the finished runs, the report."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from dataclasses import asdict
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prefkern_bench import environment
from studies import oracle as oracles
from studies import reviews as texts
from studies import tasks, training
from studies.parts import PARTS, SENTENCES, Run
from studies.policy import ALPHA, RANK, Policy
from studies.tasks import Sizes, Task

ROOT = Path(__file__).parent.parent.parent
# The demo's model and data are scripts, not part of the package.
sys.path.append(str(ROOT / "examples"))

import movie_pairs
import smollm2

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DIGITS = 5  # that the report keeps of a number


class Study:
    """One study: what all its runs share, and a folder of finished runs."""

    def __init__(
        self,
        model: str | None,
        reviews: Path | None,
        sizes: Sizes,
        output: Path,
        command: str,
        console: Console,
    ) -> None:
        self.model, self.sizes, self.output, self.console = model, sizes, output, console
        self.file = reviews or movie_pairs.packaged_file()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.environment = environment(self.device, command)
        self.environment["versions"]["peft"] = metadata.version("peft")
        # Everything that a run's numbers depend on, except the run and its seed.
        self.settings = {
            "model": model or DEFAULT_MODEL,
            "reviews": hashlib.sha256(self.file.read_bytes()).hexdigest()[:16],
            "sizes": asdict(sizes),
            "lora": {"r": RANK, "alpha": ALPHA},
            "device": self.environment["device"],
            "versions": self.environment["versions"],
        }
        # The tasks of one seed; the next one's take their place.
        self._tasks: dict[tuple[int, str], Task] = {}

    def conduct(self, parts: list[str], seeds: int) -> None:
        """Do every missing run, seed by seed, so that a stopped study has complete seeds."""
        for seed in range(seeds):
            for part in parts:
                for run in PARTS[part]:
                    self._run(run, seed)

    def finished(self, run: Run, seed: int) -> dict[str, Any] | None:
        """A run's file, if it was made with this study's settings."""
        path = self._path(run, seed)
        if not path.exists():
            return None
        earlier = json.loads(path.read_text(encoding="utf-8"))
        return earlier if earlier["settings"] == self._settings(run, seed) else None

    def report(self, seeds: int) -> dict[str, Any]:
        """Every part's runs, of the seeds for which the part is complete."""
        parts, data, seconds, processor = {}, {}, {}, {}
        for part, runs in PARTS.items():
            for seed in range(seeds):
                found = {run.key: self.finished(run, seed) for run in runs}
                done = {key: value for key, value in found.items() if value is not None}
                if len(done) < len(found):
                    continue
                for key, value in done.items():
                    seconds[key, seed] = value["seconds"]
                    processor[key, seed] = value["processor_seconds"]
                    kept = {name: value[name] for name in ("steps", "curves", "judged")}
                    parts.setdefault(part, {}).setdefault(key, {})[str(seed)] = kept
                    if value["data"]:
                        task = next(run.task for run in runs if run.key == key)
                        data.setdefault(task, {})[str(seed)] = value["data"]
        shared = ("model", "sizes", "lora")
        return _rounded(
            {
                **self.environment,
                "seconds": round(sum(seconds.values())),
                "processor_seconds": round(sum(processor.values())),
                "runs": len(seconds),
                "settings": {name: self.settings[name] for name in shared},
                "oracle": self._kept_oracle["report"],
                "data": data,
                "parts": parts,
            }
        )

    def _run(self, run: Run, seed: int) -> None:
        if self.finished(run, seed) is not None:
            return
        task, policy = self._task(run.task, seed)
        started, used = time.perf_counter(), time.process_time()
        objective = run.build()
        sizes = self.sizes
        steps = sizes.steps
        if run.task != SENTENCES:
            steps = 2 * -(-sizes.quality_pairs // sizes.pairs_a_step)  # two epochs
        result = training.train(policy, task, objective, run.learning_rate, steps, sizes, seed)
        judged = training.judge(policy, task, self._oracle, sizes)
        seconds = time.perf_counter() - started
        write(
            self._path(run, seed),
            {
                "settings": self._settings(run, seed),
                "date": self.environment["date"],
                "seconds": round(seconds, 1),
                "processor_seconds": round(time.process_time() - used, 1),
                "data": task.report,
                "judged": judged,
                **result,
            },
        )
        curves = result["curves"]["held_out"]
        self.console.print(
            f"seed {seed}, {run.key}: {seconds:.0f} s, held-out loss {curves['loss'][0]:.3f} to "
            f"{curves['loss'][-1]:.3f}, accuracy {curves['reward_accuracy'][-1]:.3f}, "
            f"true reward {judged['sampled']['reward']:.2f}"
        )

    def _settings(self, run: Run, seed: int) -> dict[str, Any]:
        # What is given, and not all options: a new one whose default changes nothing is no new run.
        own = {"objective": run.objective, "options": run.options, "task": run.task}
        return {**self.settings, **own, "learning_rate": run.learning_rate, "seed": seed}

    def _path(self, run: Run, seed: int) -> Path:
        return self.output / f"runs/{run.key}-seed{seed}.json"

    def _task(self, name: str, seed: int) -> tuple[Task, Policy]:
        policy = self._policy if name == SENTENCES else self._fine_tuned
        if (seed, name) not in self._tasks:
            self.console.print(f"seed {seed}: pairs, and the reference's log-probs")
            self._tasks = {key: task for key, task in self._tasks.items() if key[0] == seed}
            if name == SENTENCES:
                made = {name: tasks.sentences(policy, self._texts, self.sizes, seed)}
            else:
                made = tasks.qualities(policy, self._texts, self._oracle, self.sizes, seed)
                policy.reset(seed)
                # The prompts are the same for each quality, and so is the policy before a run.
                before = training.judge(policy, made[name], self._oracle, self.sizes)
                for task in made.values():
                    task.report["before"] = before
            self._tasks |= {(seed, each): task for each, task in made.items()}
        return self._tasks[seed, name], policy

    @cached_property
    def _texts(self) -> texts.Texts:
        return texts.load(self.file)

    @cached_property
    def _kept_oracle(self) -> dict[str, Any]:
        path = self.output / f"oracle-{self.settings['reviews']}.pt"
        if not path.exists():
            self.console.print("The true reward: a sentiment classifier, once for all runs")
            trained, report = oracles.train(self._texts)
            kept = {"vocabulary": trained.vocabulary, "weights": trained.weights, "report": report}
            self.output.mkdir(parents=True, exist_ok=True)
            torch.save(kept, path)
        return torch.load(path, weights_only=True)

    @cached_property
    def _oracle(self) -> oracles.Oracle:
        return oracles.Oracle(self._kept_oracle["vocabulary"], self._kept_oracle["weights"])

    @cached_property
    def _policy(self) -> Policy:
        return Policy(self._model_path(), self.sizes.layers, self.device)

    @cached_property
    def _fine_tuned(self) -> Policy:
        """MADPO's first stage, once for all seeds."""
        policy = Policy(self._model_path(), self.sizes.layers, self.device)
        sizes = self.sizes
        own = {**self.settings, "sizes": [sizes.layers, sizes.sft_steps, sizes.sft_rows]}
        digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]
        path = self.output / f"fine-tuned-{digest}.pt"
        if path.exists():
            policy.load_adapter(torch.load(path, weights_only=True))
        else:
            self.console.print("Supervised fine-tuning on positive reviews, once for all runs")
            tasks.fine_tune(policy, self._texts, sizes)
            self.output.mkdir(parents=True, exist_ok=True)
            torch.save(policy.adapter(), path)
        policy.merge()
        return policy

    def _model_path(self) -> str:
        # The demo uses the same folder.
        return self.model or str(smollm2.prepare(ROOT / ".demo/smollm2-135m-instruct"))


def write(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename it, so that no file is half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    # A list of numbers on one line; no line ends within a string of JSON.
    numbers = re.compile(r"\[\n[\s\d.,eE+-]*\]")
    text = numbers.sub(lambda found: " ".join(found[0].split()), json.dumps(value, indent=1))
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [*map(_rounded, value)] if isinstance(value, list) else value
