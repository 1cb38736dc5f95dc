"""The old name of `prefkern.data.collate`."""

from prefkern.data.collate import (
    ExampleCollator,
    PreferenceCollator,
    first_sequence,
    sequence_count,
)

__all__ = ["ExampleCollator", "PreferenceCollator", "first_sequence", "sequence_count"]
