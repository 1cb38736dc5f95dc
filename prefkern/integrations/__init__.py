"""prefkern inside other libraries, and other libraries' kernels beside prefkern's."""
