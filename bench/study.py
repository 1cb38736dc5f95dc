"""Tries what AdaDPO and MADPO claim, on one small model and reviews of films.

    python bench/study.py                        # every part, three seeds
    python bench/study.py --parts grid --seeds 2
    python bench/study.py --draw-only bench/results/study-cpu.json --page bench/STUDY.md

Each run trains the last layers of SmolLM2-135M-Instruct (or of `--model`) and is kept as a file of
its own. A stopped study goes on: a run is not repeated if the output folder has it already, with
the same settings, machine and versions. A call writes one JSON file with the measurements of every
part and seed that are complete, and draws its pictures next to it. `--page` rewrites the figures
of a Markdown page from the JSON, and `--draw-only` does that without training.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import transformers
from rich.console import Console

from studies import claims, figures, page
from studies.parts import PARTS
from studies.study import Study, write
from studies.tasks import Sizes

ROOT = Path(__file__).parent.parent


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="Hugging Face folder or hub name; default: SmolLM2-135M")
    parser.add_argument(
        "--reviews", type=Path, help="CSV of text, label, source; default: the movie reviews"
    )
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--seeds", type=_positive, default=3, help="number of seeds, from 0 on")
    parser.add_argument(
        "--output", type=Path, default=ROOT / ".demo/study", help="folder that keeps finished runs"
    )
    parser.add_argument("--json", type=Path, help="default: study.json in the output folder")
    parser.add_argument("--page", type=Path, help="Markdown page whose figures to rewrite")
    parser.add_argument(
        "--report-only", action="store_true", help="train nothing; report the finished runs"
    )
    parser.add_argument(
        "--draw-only", type=Path, metavar="JSON", help="only draw, from an earlier call's JSON"
    )
    sizes = parser.add_argument_group("sizes")
    for size in fields(Sizes):
        sizes.add_argument(
            f"--{size.name.replace('_', '-')}", type=_positive, default=size.default, metavar="N"
        )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    console = Console(highlight=False)
    if arguments.draw_only:
        path = arguments.draw_only
        report = json.loads(path.read_text(encoding="utf-8"))
    else:
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        # peft 0.21.2 reads an attribute that transformers 5.23 has renamed, and that gives a
        # warning.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        path = arguments.json or arguments.output / "study.json"
        command = shlex.join(
            ["python", "bench/study.py", *(sys.argv[1:] if argv is None else argv)]
        )
        study = Study(
            model=arguments.model,
            reviews=arguments.reviews,
            sizes=Sizes(**{size.name: getattr(arguments, size.name) for size in fields(Sizes)}),
            output=arguments.output,
            command=command,
            console=console,
        )
        if not arguments.report_only:
            study.conduct(arguments.parts, arguments.seeds)
        report = study.report(arguments.seeds)
        write(path, report)
    for verdict in claims.judged(report):
        console.print(f"{verdict.word}: {verdict.claim.text}", style="bold")
        console.print(f"    {verdict.numbers}")
    pictures = figures.draw(report, path)
    console.print(f"Numbers: {path}. Pictures: {', '.join(map(str, pictures.values()))}.")
    if arguments.page:
        page.write(report, pictures, arguments.page)


if __name__ == "__main__":
    main()
