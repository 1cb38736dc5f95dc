"""The old name of `prefkern.models.adapters`."""

from prefkern.models.adapters import *
