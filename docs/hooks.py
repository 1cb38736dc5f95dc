"""What mkdocs has to know of this repository: pages outside docs/, and links to them.

Pages link to files as they lie in the repository, so that links work there. On the site docs/ is
the root, the pages of bench/ and examples/ and the changelog are beside it under their own names,
and a source or result file that a page links to is copied to its own path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = ("bench/*.md", "examples/*.md", "CHANGELOG.md")
# A link's or a picture's target, up to its anchor; neither an address nor an anchor alone.
TARGET = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and the files that pages link to."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for page in list(files.documentation_pages()):
        for name in TARGET.findall(page.content_string):
            uri = site_uri(page.src_uri, name)
            if (ROOT / uri).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / uri)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are on the site; mkdocs checks them."""
    folder = posixpath.dirname(page.file.src_uri)

    def on_site(match: re.Match[str]) -> str:
        uri = site_uri(page.file.src_uri, match[1])
        if files.get_file_from_path(uri) is None:
            return match[0]
        return posixpath.relpath(uri, folder or ".")

    return TARGET.sub(on_site, markdown)


def site_uri(page: str, target: str) -> str:
    """The site's name of what a page links to by its place in the repository."""
    inside = (ROOT / "docs" / page).is_file()
    folder = posixpath.dirname(f"docs/{page}" if inside else page)
    return posixpath.normpath(posixpath.join(folder, target)).removeprefix("docs/")
