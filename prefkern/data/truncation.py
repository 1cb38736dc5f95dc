"""Truncation of pairs that are too long: three modes, with TRL's names where TRL has them.

keep_end    Cuts the beginning of the prompt. Cuts the end of a response only if it does not fit
            beside one token of the prompt. (TRL's deprecated mode of the same name keeps the end of
            each sequence. It may cut the beginning of a response, and it gives chosen and rejected
            different prompts.)
keep_start  Cuts the end, responses first; TRL 1.x does this by default. If the prompt fills
            `max_length`, no token of the pair is left to score.
drop        Cuts nothing. A pair that does not fit has no token left to score.

Chosen and rejected keep the same prompt. If a pair has no token left to score, the caller drops it
and counts it.
"""

from __future__ import annotations

TRUNCATION_MODES = ("keep_end", "keep_start", "drop")
TRUNCATION_HELP = (
    "How to shorten a pair that is too long: keep_end cuts the beginning of the prompt, keep_start "
    "cuts the ends (as TRL does), drop cuts nothing and drops the pair."
)


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
    check_mode(mode)
    if mode == "drop":
        fits_prompt = max_prompt_length is None or len(prompt) <= max_prompt_length
        longest = len(prompt) + max(len(chosen), len(rejected))
        fits = fits_prompt and (max_length is None or longest <= max_length)
        return (prompt, chosen, rejected) if fits else (prompt, [], [])
    if mode == "keep_start":
        prompt = prompt[:max_prompt_length]
        if max_length is not None:
            prompt = prompt[:max_length]
            budget = max_length - len(prompt)
            chosen, rejected = chosen[:budget], rejected[:budget]
        return prompt, chosen, rejected
    if max_prompt_length is not None:
        prompt = prompt[-max_prompt_length:]
    if max_length is not None:
        # At least one token of context, so that the first token of the response is scored.
        room = max(max_length - max(len(chosen), len(rejected)), 1)
        prompt = prompt[-room:]
        budget = max_length - len(prompt)
        chosen, rejected = chosen[:budget], rejected[:budget]
    return prompt, chosen, rejected
