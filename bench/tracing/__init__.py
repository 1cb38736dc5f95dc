"""The CUDA path without a GPU: calls on fake CUDA tensors, with every launch recorded and none run.

`machine` pretends a GPU, and `engine` runs autograd's backward, which wants a driver. `watch` sees
each operator and each launch, and holds them to `rules`. `expected` derives launches, products and
synchronisations from a plan. `cases` has the calls, `faults` breaks the source on purpose.
`bench/trace_cuda.py` runs it all and writes the page.
"""
