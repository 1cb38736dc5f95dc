"""The operator: log-probs, and a divergence, from hidden states and a head, without logits in memory.

In reading order, from hidden states to gradients:

- `logprobs` and `kl`: the public calls. `checks`, `plain`, `sequences`: their arguments, and the
  scored tokens.
- `call`: plans a call and runs it. `plan`: tiles and structure. `memory`: when memory runs out.
- `autograd`: the autograd function. `once`: a second derivative raises. `compiled`: the same for
  `torch.compile`.
- `passes` and `backward`: the mathematics and the loops over tiles, with `fold_state` and
  `operands`.
- `shards`: a head over several ranks.
- `tile_ops`: the functions on a tile. `prefkern_kernels` has them in Triton, `torch_tiles` in
  torch.

Nothing here knows of objectives or models.
"""
