"""The formats of others: a row of each, and the row of TRL's that it is read as.

`python -m support.foreign_cases` prints the table of docs/data.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _from(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


@dataclass(frozen=True)
class Case:
    """A format; `name` is what the report calls it, `home` who writes it."""

    home: str
    name: str
    before: Row
    after: Row

    @property
    def paired(self) -> bool:
        return "completion" not in self.after


ASKED = [_said("user", "was the film good ?")]
GOOD, BAD = [_said("assistant", "very good")], [_said("assistant", "bad")]
SYSTEM = _said("system", "very fine")
PAIR = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
SINGLE = {"prompt": ASKED, "completion": GOOD, "label": True}
TEXTS = {"chosen": "very good", "rejected": "bad"}
ALPACA = {"instruction": "was the film", "input": "good ?"}
JOINED = [_said("user", "was the film\ngood ?")]
HUMAN = [_from("human", "was the film good ?")]
TWO_TURNS = [_said("user", "film ?"), _said("assistant", "fine"), *ASKED]

CASES = (
    Case(
        "Alpaca; LLaMA-Factory's pairs",
        "Alpaca",
        {**ALPACA, **TEXTS},
        {**PAIR, "prompt": JOINED},
    ),
    Case(
        "LLaMA-Factory, with system and history",
        "Alpaca",
        {
            "instruction": "was the film good ?",
            "input": "",
            **TEXTS,
            "system": "very fine",
            "history": [["film ?", "fine"]],
        },
        {**PAIR, "prompt": [SYSTEM, *TWO_TURNS]},
    ),
    Case(
        "LLaMA-Factory, older",
        "Alpaca",
        {**ALPACA, "output": ["very good", "bad"]},
        {**PAIR, "prompt": JOINED},
    ),
    Case(
        "LLaMA-Factory's KTO",
        "Alpaca",
        {**ALPACA, "output": "very good", "kto_tag": True},
        {**SINGLE, "prompt": JOINED},
    ),
    Case(
        "ShareGPT; LLaMA-Factory's pairs",
        "ShareGPT",
        {
            "conversations": HUMAN,
            "chosen": _from("gpt", "very good"),
            "rejected": _from("gpt", "bad"),
        },
        PAIR,
    ),
    Case(
        "ShareGPT, whole conversations",
        "ShareGPT",
        {
            "chosen": [*HUMAN, _from("gpt", "very good")],
            "rejected": [*HUMAN, _from("gpt", "bad")],
        },
        PAIR,
    ),
    Case(
        "ShareGPT; LLaMA-Factory's KTO",
        "ShareGPT",
        {"conversations": [*HUMAN, _from("gpt", "very good")], "kto_tag": True},
        SINGLE,
    ),
    Case(
        "axolotl's `chat_template.default`",
        "OpenAI's messages",
        {"messages": TWO_TURNS, "chosen": GOOD[0], "rejected": BAD[0]},
        {**PAIR, "prompt": TWO_TURNS},
    ),
    Case(
        "axolotl's `argilla`",
        "Argilla",
        {
            "instruction": "was the film good ?",
            "chosen_response": "very good",
            "rejected_response": "bad",
        },
        PAIR,
    ),
    Case(
        "Orca; axolotl's `intel`",
        "Orca",
        {"system": "very fine", "question": "was the film good ?", **TEXTS},
        {**PAIR, "prompt": [SYSTEM, *ASKED]},
    ),
    Case(
        "Orca; axolotl's `icr`",
        "Orca, question as input",
        {"system": "", "input": "was the film good ?", **TEXTS},
        PAIR,
    ),
    Case(
        "axolotl's KTO, `intel`",
        "Orca",
        {"question": "was the film good ?", "completion": "bad", "label": False},
        {**SINGLE, "completion": BAD, "label": False},
    ),
    Case(
        "HH",
        "HH",
        {
            "chosen": "\n\nHuman: film ?\n\nAssistant: the plot is very good",
            "rejected": "\n\nHuman: film ?\n\nAssistant: the plot is bad",
        },
        {
            "prompt": "\n\nHuman: film ?\n\nAssistant:",
            "chosen": " the plot is very good",
            "rejected": " the plot is bad",
        },
    ),
    Case(
        "Nectar, ranked",
        "Nectar",
        {
            "prompt": "\n\nHuman: film ?\n\nAssistant: ",
            "answers": [
                {"answer": "the plot is fine", "rank": 2.0},
                {"answer": "the plot is very good", "rank": 1.0},
                {"answer": "the plot is bad", "rank": 3.0},
            ],
        },
        {
            "prompt": "\n\nHuman: film ?\n\nAssistant:",
            "chosen": " the plot is very good",
            "rejected": " the plot is bad",
        },
    ),
    Case(
        "UltraFeedback, ranked",
        "UltraFeedback, ranked",
        {
            "instruction": "was the film good ?",
            "completions": [
                {"response": "bad", "fine-grained_score": 2.5},
                {"response": "very good", "fine-grained_score": 4.75},
            ],
        },
        PAIR,
    ),
    Case(
        "answers with `scores` or `ranks` beside them",
        "rankings",
        {
            "prompt": "was the film good ?",
            "responses": ["fine", "bad", "very good"],
            "scores": [0.5, -1.0, 2.0],
        },
        PAIR,
    ),
    Case(
        "axolotl's KTO, `argilla_chat`",
        "OpenAI's messages",
        {"completion": [*ASKED, *GOOD], "label": True},
        SINGLE,
    ),
    Case(
        "UltraFeedback",
        "UltraFeedback",
        {
            "prompt": "was the film good ?",
            "chosen": [*ASKED, *GOOD],
            "rejected": [*ASKED, *BAD],
            "score_chosen": 8.0,
            "score_rejected": 2.5,
        },
        PAIR,
    ),
)


def _code(row: Row) -> str:
    """A row in one cell of a table."""
    return f"`{json.dumps(row)}`".replace("|", "\\|")


def table() -> str:
    """The formats, a row of each before and after."""
    lines = ["| format | a row | read as |", "|---|---|---|"]
    lines += [f"| {case.home} | {_code(case.before)} | {_code(case.after)} |" for case in CASES]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
