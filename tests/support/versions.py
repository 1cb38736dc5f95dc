"""What the packages that tests run on have only from some version on: expectations and skips name it.

`tests/system/test_versions.py` holds each version between the oldest and the newest that are tested.
So on the newest nothing is skipped, and nothing is expected of an older one, for its age.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import pytest
from packaging.version import Version


@dataclass(frozen=True)
class Since:
    """Something that a package has since a version."""

    package: str
    version: str
    what: str

    @property
    def is_here(self) -> bool:
        """Whether the package is installed, and new enough."""
        found = self._installed()
        return found is not None and Version(found) >= Version(self.version)

    @property
    def is_too_old(self) -> bool:
        found = self._installed()
        return found is not None and Version(found) < Version(self.version)

    @property
    def reason(self) -> str:
        """Of a skip."""
        return f"{self.package} {self._installed()} is before {self.version}: {self.what}"

    @property
    def needed(self) -> pytest.MarkDecorator:
        """The mark of a test that an older version skips, where the skip is seen."""
        return pytest.mark.skipif(self.is_too_old, reason=self.reason)

    def param(self, *values: Any) -> Any:
        """A case that an older version skips."""
        return pytest.param(*values, marks=self.needed)

    def _installed(self) -> str | None:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


PIL_IDEFICS = Since("transformers", "5.18", "Idefics 3's processor loads without torchvision")
# Before, tables of rotations are products, and of one row for all rows of a padded batch.
ROTATIONS_WITHOUT_PRODUCTS = Since(
    "transformers", "5.19", "tables of rotations take no matrix product"
)
GEMMA2_EAGER = Since("transformers", "5.21", "Gemma 2 has eager attention, which has its softcap")
CHUNKS_PER_SEQUENCE = Since("transformers", "5.23", "chunks begin with each packed sequence")
TENSOR_PARALLEL = Since("transformers", "5.23", "tensor parallelism is not refused")
TENSOR_PARALLEL_ADAPTERS = Since(
    "peft", "0.21", "adapters under tensor parallelism are not refused"
)
PARALLELISM = Since("accelerate", "1.12", "Trainer takes a ParallelismConfig")
ADAPTERS_LOADED_BESIDE = Since("peft", "0.21", "an adapter stays trainable when another is loaded")
WHOLE_ADAPTERS = Since("accelerate", "1.15", "FSDP2's whole checkpoints hold adapters")
# PEFT before puts an adaption prompt that is added in the place of the one in use.
PROMPTS_ADDED_UNUSED = Since("peft", "0.21", "an added adaption prompt is not in use")
# They cancel between two responses, unless each is divided by its length.
TRL_CONSTANTS = Since("trl", "1.10", "TRL's f-divergences keep their constants")
TRL_DEEPSEEK = Since("trl", "1.11", "TRL carries the chat template of DeepSeek-R1-Distill")
TRL_SMOLVLM = Since("trl", "1.15", "TRL carries the chat template of SmolVLM")
TRL_TILES = Since("trl", "1.14", "TRL computes log-probs in tiles")
TRL_ROUTER_DEFAULT = Since("trl", "1.14", "router_aux_loss_coef is None by default")
TRL_PADS = Since("trl", "1.16", "pad_to_multiple_of is 'auto' by default")
TRL_ASKS = Since("trl", "1.16", "TRL's DPO, KTO and SFT trainers ask their models for log-probs")
