"""The old name of `prefkern.models.adapters` and `prefkern.models.own_reference`."""

from prefkern.models.adapters import *
from prefkern.models.own_reference import adapter_in_use as adapter_in_use
