"""The old name of `prefkern.models.adapters` and `prefkern.models.own_reference`."""

from prefkern.models import own_reference
from prefkern.models.adapters import *

adapter_in_use = own_reference.adapter_in_use
