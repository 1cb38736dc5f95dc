"""Truncation of pairs that are too long: three modes, with TRL's names where TRL has them.

keep_end    Cuts the beginning of the prompt. Cuts the end of a response only if it does not fit
            beside one token of the prompt. (TRL's deprecated mode of the same name keeps the end of
            each sequence. It may cut the beginning of a response, and it gives chosen and rejected
            different prompts.)
keep_start  Cuts the end, responses first; TRL 1.x does this by default. If the prompt fills
            `max_length`, no token of the pair is left to score.
drop        Cuts nothing. A pair that does not fit has no token left to score.

All responses of a pair keep the same prompt. If a pair has no token left to score, the caller drops it
and counts it.
"""

from __future__ import annotations

from dataclasses import dataclass

TRUNCATION_MODES = ("keep_end", "keep_start", "drop")
TRUNCATION_HELP = (
    "How to shorten a pair that is too long: keep_end cuts the beginning of the prompt, keep_start "
    "cuts the ends (as TRL does), drop cuts nothing and drops the pair."
)


class NothingToScore(ValueError):
    """A dataset has no row with a token to score."""


def check_mode(mode: str) -> None:
    """Raise ValueError for a truncation mode that does not exist."""
    if mode not in TRUNCATION_MODES:
        known = ", ".join(map(repr, TRUNCATION_MODES))
        raise ValueError(f"truncation_mode must be one of {known}, got {mode!r}")


def truncate(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    max_length: int | None,
    max_prompt_length: int | None,
    mode: str = "keep_end",
) -> tuple[list[int], list[int], list[int]]:
    """A pair's tokens within the bounds; both responses are empty if the pair cannot meet them.

    Args:
        max_length: bound on prompt plus response; max_prompt_length: bound on the prompt. None for
            no bound.
        mode: one of `TRUNCATION_MODES`.

    Raises ValueError for another mode.
    """
    prompt, responses = truncate_responses(
        prompt, [chosen, rejected], max_length, max_prompt_length, mode
    )
    return prompt, responses[0], responses[1]


def truncate_responses(
    prompt: list[int],
    responses: list[list[int]],
    max_length: int | None,
    max_prompt_length: int | None,
    mode: str = "keep_end",
) -> tuple[list[int], list[list[int]]]:
    """`truncate`, for any number of responses to a prompt."""
    check_mode(mode)
    longest = max(map(len, responses))
    if mode == "drop":
        fits_prompt = max_prompt_length is None or len(prompt) <= max_prompt_length
        fits = fits_prompt and (max_length is None or len(prompt) + longest <= max_length)
        return prompt, responses if fits else [[] for _ in responses]
    if mode == "keep_start":
        prompt = prompt[:max_prompt_length]
        if max_length is None:
            return prompt, responses
        prompt = prompt[:max_length]
    else:
        if max_prompt_length is not None:
            prompt = prompt[-max_prompt_length:]
        if max_length is None:
            return prompt, responses
        # At least one token of context, so that the first token of the response is scored.
        prompt = prompt[-max(max_length - longest, 1) :]
    budget = max_length - len(prompt)
    return prompt, [response[:budget] for response in responses]


@dataclass(frozen=True)
class Bounds:
    """How long a pair may be. Raises ValueError for bounds that no pair can meet."""

    max_length: int | None
    max_prompt_length: int | None
    truncation_mode: str

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}")
        check_mode(self.truncation_mode)

    def cut(self, tokens: list[list[int]]) -> list[list[int]]:
        """A prompt and its responses within the bounds."""
        bounds = (self.max_length, self.max_prompt_length, self.truncation_mode)
        prompt, responses = truncate_responses(tokens[0], tokens[1:], *bounds)
        return [prompt, *responses]
