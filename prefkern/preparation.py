"""The old name of `prefkern.models.adapters`."""

from prefkern.models.adapters import (
    adapt,
    adapter_in_use,
    base_parameters,
    check_no_native_adapter,
    check_reference_adapter,
    check_unmerged,
    disable_dropout,
    is_peft_model,
    is_trained_adapter,
    with_own_rates,
)

__all__ = [
    "adapt",
    "adapter_in_use",
    "base_parameters",
    "check_no_native_adapter",
    "check_reference_adapter",
    "check_unmerged",
    "disable_dropout",
    "is_peft_model",
    "is_trained_adapter",
    "with_own_rates",
]
