"""The description on a package index: README.md, with the links that work there.

A package index shows the text apart from the repository, where a link to a file leads nowhere. So a
link to a file keeps its text alone, and a picture among the files is left out. Everything else of
the package is in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

# Where the files are that the text names.
PLACES = (
    "\nThe pages and results that this text names are files of the source archive: `docs/`, `bench/` "
    "and `examples/`.\n"
)
# Neither has an address: a place in the repository, or a heading.
PICTURE = re.compile(r"!\[[^\]]*\]\((?!\w+:)[^)]*\)\n*")
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)[^)]*\)")


def described(readme: str) -> str:
    """The README as it reads outside the repository; its code stays as it is."""
    parts = re.split(r"(^```.*?^```$)", readme, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [LINK.sub(r"\1", PICTURE.sub("", part)) for part in parts[::2]]
    return "".join(parts) + PLACES


if __name__ == "__main__":
    setup(
        long_description=described((Path(__file__).parent / "README.md").read_text("utf-8")),
        long_description_content_type="text/markdown",
    )
