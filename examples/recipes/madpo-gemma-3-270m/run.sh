#!/usr/bin/env bash
# Runs MADPO's four stages on Gemma-3-270M (MADPO, Section 5.1); results go to ./madpo. Stage 1 needs
# TRL: pip install trl. Arguments go to stage 2, which chooses the quality of the data:
#   bash examples/recipes/madpo-gemma-3-270m/run.sh --quality low
set -euo pipefail
here=$(dirname "$0")

trl sft --config "$here/1-sft.yaml"
python "$here/merge.py" madpo/sft-adapter madpo/sft
python "$here/2-pairs.py" --model madpo/sft --output madpo "$@"
prefkern margins "$here/3-margins.yaml"
prefkern train "$here/4-train.yaml"
