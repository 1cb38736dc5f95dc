"""Rows to look at: who says what, in a few lines; and the tokens that the model sees.

The tokens are those of a batch. Which of them are scored is read off its labels, as the loss reads
it, so whatever leaves tokens out of the labels shows here. On a terminal scored tokens are green, in
two shades, so that each can be told from the next. Elsewhere they stand between `⟦` and `⟧`. A `‖`
is the boundary of prompt and response, and a line break in the text has a `↵` before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from prefkern.data.messages import content_of

if TYPE_CHECKING:
    from rich.text import Text

_WIDTH = 72
_BOUNDARY = "‖"
_SCORED = ("black on green", "black on bright_green")
_UNSCORED = "dim"
Said = tuple[tuple[str, str], ...]  # who, and what


def said(prompt: Any, responses: dict[str, Any]) -> Said:
    """A row as lines, each short.

    Args:
        prompt: text, or messages.
        responses: text or messages, by the names of their columns.
    """
    lines = [("prompt", prompt)] if isinstance(prompt, str) else _turns(prompt)
    for name, response in responses.items():
        if isinstance(response, str):
            lines.append((name, response))
            continue
        turns = _turns(response)
        lines += [(name if len(turns) == 1 else f"{name}: {role}", text) for role, text in turns]
    return tuple((who, _short(text)) for who, text in lines)


def _turns(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(str(message["role"]), _content(message)) for message in messages]


def _content(message: dict[str, Any]) -> str:
    calls = message.get("tool_calls")
    return content_of(message) + (f" tool_calls={calls}" if calls else "")


def _short(text: str) -> str:
    # The end of a prompt is where the response begins, so the middle is left out.
    text = repr(text)[1:-1]
    half = (_WIDTH - 5) // 2
    return text if len(text) <= _WIDTH else f"{text[:half]} ... {text[-half:]}"


@dataclass(frozen=True)
class Tokens:
    """A prompt and a response, token by token."""

    name: str  # of the response
    texts: tuple[str, ...]
    scored: tuple[bool, ...]
    prompt: int  # how many of them are the prompt's

    @classmethod
    def of(
        cls, name: str, ids: Sequence[int], labels: Sequence[int], prompt: int, tokenizer: Any
    ) -> Tokens:
        """The tokens of one sequence of a batch, without padding.

        Args:
            ids, labels: as the model takes them; a label below 0 is not scored.
            prompt: how many tokens are the prompt's.
        """
        # Nothing predicts the first token.
        scored = (False, *(label >= 0 for label in labels[1:]))
        return cls(name, token_texts(tokenizer, ids), scored, prompt)

    @property
    def title(self) -> str:
        length, scored = len(self.texts), sum(self.scored)
        own = length - self.prompt
        return f"{self.name}: {self.prompt} tokens of prompt, {own} of response, {scored} scored"

    def __str__(self) -> str:
        """The sequence as plain text, scored tokens between brackets."""
        return self._marked(0, self.prompt) + _BOUNDARY + self._marked(self.prompt, None)

    def _marked(self, start: int, end: int | None) -> str:
        tokens = zip(self.texts[start:end], self.scored[start:end], strict=True)
        runs = [
            (is_scored, "".join(text for text, _ in run))
            for is_scored, run in groupby(tokens, key=lambda token: token[1])
        ]
        return "".join(
            f"⟦{_broken(text)}⟧" if is_scored else _broken(text) for is_scored, text in runs
        )

    def __rich__(self) -> Text:
        """The sequence for a terminal, scored tokens in colour."""
        from rich.text import Text

        shown = Text()
        for at, (text, is_scored) in enumerate(zip(self.texts, self.scored, strict=True)):
            if at == self.prompt:
                shown.append(_BOUNDARY, style="bold red")
            shown.append(_broken(text), style=_SCORED[at % 2] if is_scored else _UNSCORED)
        return shown


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds to those before it.

    Where several tokens share a character, it is the last one's.
    """

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)

    texts: list[str] = []
    start = shown = 0
    for end in range(1, len(ids) + 1):
        # A tokenizer may drop the space before the first token that it decodes, so each is decoded
        # after those before it.
        text = decode(start, end)
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(decode(start, shown)) :])
        start, shown = shown, end
    return tuple(texts)


def _broken(text: str) -> str:
    return text.replace("\n", "↵\n")
