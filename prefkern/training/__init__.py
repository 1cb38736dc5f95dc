"""Training on transformers: the trainers, their arguments, checkpoints, metrics and the reference's cache.

In reading order: `config`, `item_trainer`, `objective_trainer`, `trainer`, `checks`, then what they
stand on: `checkpoints` with `run_state`, `unsaved` and `files`; `metrics`; `reference_cache`; and
`rewards`, the reward model that MADPO needs.
"""
