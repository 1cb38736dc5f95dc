"""prefkern inside other libraries' trainers, and their kernels beside prefkern's.

Each module needs its library, and says so.
"""
