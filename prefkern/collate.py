"""The old name of `prefkern.data.collate`."""

from prefkern.data.collate import *
