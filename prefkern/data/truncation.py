"""What becomes of a pair that is too long: three policies, under TRL's names where it has them.

keep_end    The prompt loses its beginning, and a response its end only if it does not fit beside a
            single token of prompt. (TRL's deprecated mode of that name keeps the end of each
            sequence: it may cut the beginning of a response, and gives chosen and rejected
            different prompts.)
keep_start  Prompt and response lose their end, as by default in TRL 1.x: responses are cut first. A
            pair whose prompt fills `max_length` has nothing left to score.
drop        Nothing is cut: a pair that does not fit has nothing left to score.

Chosen and rejected keep the same prompt. A pair of which nothing is left to score is dropped by the
caller, and counted.
"""

from __future__ import annotations

TRUNCATION_MODES = ("keep_end", "keep_start", "drop")
TRUNCATION_HELP = (
    "What becomes of what is too long: keep_end cuts the prompt's beginning, keep_start the ends "
    "(as TRL), drop nothing."
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
    """A pair's tokens within the bounds; both responses are empty where they cannot be met.

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
