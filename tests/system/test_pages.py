"""The pages as text: their length, their English, their links, and the files that they name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *DOCS,
    *sorted((ROOT / "bench").glob("*.md")),
]
# In any page; vocabulary entries are not "words".
BANNED = (
    r"comes? of\b",
    r"what becomes? of|what became of",
    r"(is|are|was|were) told\b",
    r"is no number",
    r"a step whose",
    r"\w+ of words\b|\d words\b|unit and word\b|words? to a hidden",
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """Without code, on one line."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    return " ".join(text.split())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_plain_english(page):
    found = [m[0] for phrase in BANNED for m in re.finditer(phrase, prose(page), re.IGNORECASE)]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    """Files, and headings of pages, by the names that GitHub and the site give them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert not target.startswith(("http:", "/")), target
        if target.startswith("https:"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.is_file() and linked.is_relative_to(ROOT), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_every_page_is_in_the_sites_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1].split("\nplugins:")[0]
    listed = re.findall(r"([\w/]+\.md)$", navigation, re.MULTILINE)
    # The site has its own first page, and a longer page on contributing.
    beside = (*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md")
    outside = [name(page) for page in PAGES if page not in beside]
    assert sorted(listed) == sorted(
        [*(page.relative_to(ROOT / "docs").as_posix() for page in DOCS), *outside]
    )


def test_the_architectures_files_are_there():
    page = (ROOT / "docs/architecture.md").read_text()
    files = set(re.findall(r"`((?:[\w]+/)*[\w]+(?:\.py|/))`", page))
    assert len(files) > 40
    places = (ROOT, ROOT / "prefkern", ROOT / "kernels", ROOT / "kernels/prefkern_kernels")
    objectives = (ROOT / "prefkern/objectives",)
    for file in files:
        assert any((place / file).exists() for place in (*places, *objectives)), file


def test_every_folder_is_in_the_architecture():
    page = (ROOT / "docs/architecture.md").read_text()
    folders = {path.parent.name for path in (ROOT / "prefkern").glob("*/__init__.py")}
    assert all(f"`{folder}/" in page for folder in folders)


def test_the_diagram_is_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (c["layers"] for c in contracts["contracts"] if c["type"] == "layers")
    diagram = (ROOT / "docs/architecture.svg").read_text()
    drawn = re.findall(r'y="(\d+)" class="name">(\w+)<', diagram)
    rows: dict[int, list[str]] = {}
    for height, layer in drawn:
        rows.setdefault(int(height), []).append(layer)
    named = [[part.strip().removeprefix("prefkern.") for part in x.split("|")] for x in layers]
    assert [rows[height] for height in sorted(rows)] == named


def test_the_counts_of_model_classes_are_the_families_page_s():
    page = (ROOT / "bench/FAMILIES.md").read_text()
    found = re.search(
        r"^(\d+) classes: (\d+) agrees, (\d+) refused, \d+ not run, 0 differs", page, re.MULTILINE
    )
    assert found
    total, agree, refused = found.groups()
    models, readme = ((ROOT / file).read_text() for file in ("docs/models.md", "README.md"))
    assert (
        f"Of its {total} such classes, built tiny, {agree} agree with their own logits, gradients "
        f"included, and {refused} are refused"
    ) in " ".join(models.split())
    assert f"{agree} of {total} classes [agree with their own logits]" in readme
    assert f", {refused} are refused |" in readme


def test_the_count_of_mutations_is_their_page_s():
    found = re.search(r"(\d+) of \1 killed", (ROOT / "bench/MUTATIONS.md").read_text())
    assert found
    trust = " ".join((ROOT / "docs/trust.md").read_text().split())
    assert f"breaks the source in {found[1]} places" in trust
