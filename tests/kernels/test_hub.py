"""`prefkern_kernels` as a kernel of the Hugging Face Hub, loaded from a folder of the Hub's layout.

`kernels` loads a build variant under a name of its own, with relative imports alone; nothing is
downloaded. It runs in a process of its own, on a path without this repository.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.version import Version

from support.machine import DEVICE, HAS_TRITON
from support.processes import ROOT

# From this one on, a variant's metadata.json says its name and backend.
LEAST = Version("0.17")

SCRIPT = """
import sys
from pathlib import Path
import kernels, torch

loaded = kernels.get_local_kernel(Path(sys.argv[1]), backend=sys.argv[2])
assert Path(loaded.__file__).is_relative_to(Path(sys.argv[1]).resolve())
assert set(loaded.__all__) <= set(vars(loaded)) and "prefkern_kernels" not in sys.modules
device = sys.argv[2]
torch.manual_seed(0)
logits = (torch.randn(5, 127) * 4).to(device)
labels = torch.randint(0, 127, (5,)).to(device)
states = {name: torch.empty(5, device=device) for name in ("maximum", "total", "label_logit", "label_slope")}
loaded.fold(
    logits.clone(), labels, None, **states, rescale=None, weights=None,
    start=0, first=True, logit_scale=1.0, softcap=None, temperature=1.0,
)
expected = torch.logsumexp(logits, 1) - logits.gather(1, labels[:, None])[:, 0]
# The label's own term is left out of the total.
maximum, label = states["maximum"], states["label_logit"]
total = states["total"] + (label - maximum).exp()
torch.testing.assert_close(maximum + total.log() - label, expected, rtol=1e-5, atol=1e-5)
assert loaded.launches["fold"] == 1
print("loaded", loaded.__name__)
"""


def installed() -> Version | None:
    # Not by an import: the folder kernels/ of this repository would answer to the name.
    try:
        return Version(metadata.version("kernels"))
    except metadata.PackageNotFoundError:
        return None


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_it_loads_from_a_folder_of_the_hubs_layout(tmp_path):
    version = installed()
    if version is None or version < LEAST:
        pytest.skip(f"kernels >= {LEAST} is not installed (found {version})")
    variant = tmp_path / "prefkern-kernels" / "build" / f"torch-{DEVICE}"
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels" / "prefkern_kernels", variant, ignore=without)
    about = {"id": "prefkern_kernels_local", "name": "prefkern-kernels", "version": 1}
    about |= {"license": "Apache-2.0", "python-depends": [], "backend": {"type": DEVICE}}
    (variant / "metadata.json").write_text(json.dumps(about))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(variant.parent.parent), DEVICE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["loaded", "prefkern_kernels_local"]
