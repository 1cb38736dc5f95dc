"""prefkern in the trainers of other libraries.

Each module needs its library; if it is missing, the import error says what to install.
"""
