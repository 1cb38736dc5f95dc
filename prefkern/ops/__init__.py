"""The operator: log-probs, and a divergence, from hidden states and a head, without logits in memory.

In reading order, from hidden states to gradients: `logprobs` (the public call), `call` (a call made
and run), `plan` (tiles and structure), `passes` (the mathematics and the loops over tiles) with
`fold_state` and `operands`, `torch_tiles` (what is done to a tile, as `prefkern_kernels` does it in
Triton), `autograd`, `compiled` (as `torch.compile` sees it). `memory` is for when memory runs out.
Nothing here knows of objectives or models.
"""
