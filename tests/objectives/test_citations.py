"""The papers that objectives cite: each registered name has one, and its BibTeX is well formed."""

from __future__ import annotations

import re

import pytest
from torch import nn

from prefkern import objectives
from prefkern.objectives import citations
from prefkern.objectives.citations import ADADPO, Paper

PAPERS = {name: value for name, value in vars(citations).items() if isinstance(value, Paper)}


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_cites_its_paper(name):
    cited = objectives.build(name).citations()
    plain = name.removeprefix("ada")
    is_adaptive = name != plain and plain in objectives.REGISTRY
    assert all(isinstance(each, Paper) for each in cited)
    assert (cited[0] == ADADPO) == is_adaptive
    of_loss = cited[1:] if is_adaptive else cited
    assert of_loss and ADADPO not in of_loss
    if is_adaptive:
        assert of_loss == objectives.build(plain).citations()


def test_each_paper_is_an_objectives_or_an_options():
    """No paper is left over, and none has the key or the number of another."""
    given = {"use_weighting": True, "rpo_alpha": 1.0, "f_divergence_type": "js_divergence"}
    cited = {
        *objectives.build("adadpo+simpo", **given).citations(),
        citations.LD_DPO,
        citations.TR_DPO,
    }
    for name in objectives.names():
        cited |= {*objectives.build(name).citations()}
    assert cited == {*PAPERS.values()}
    assert len({each.key for each in cited}) == len(cited)
    numbers = [each.arxiv for each in cited if each.arxiv is not None]
    assert len({*numbers}) == len(numbers)


@pytest.mark.parametrize("name", PAPERS)
def test_bibtex(name):
    paper = PAPERS[name]
    assert re.fullmatch(r"[a-z]+\d{4}[a-z0-9]+", paper.key) and str(paper.year) in paper.key
    kind, key, body = re.fullmatch(r"@(\w+)\{(\w+),\n(.*)\n\}", paper.bibtex, re.DOTALL).groups()
    assert key == paper.key and kind == ("misc" if paper.venue is None else "inproceedings")
    rows = dict(re.fullmatch(r"    (\w+) +=\s\{(.*)\},", row).groups() for row in body.split("\n"))
    assert rows["title"] == f"{{{paper.title}}}" and rows["author"] == paper.authors
    assert paper.bibtex.count("{") == paper.bibtex.count("}")
    if paper.arxiv is None:
        assert rows["url"].startswith("https://")
    else:
        assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
        # A paper appears on arXiv in the year of its publication, or a few before.
        assert 0 <= paper.year - (2000 + int(paper.arxiv[:2])) <= 2
        assert rows["url"] == f"https://arxiv.org/abs/{paper.arxiv}"
        assert (rows["eprint"], rows["archivePrefix"]) == (paper.arxiv, "arXiv")


def test_what_wraps_and_mixes_cites_the_parts_first():
    built = objectives.build("adasimpo+dpo", use_weighting=True, rpo_alpha=1.0)
    assert built.title == "AdaSimPO + DPO, with WPO's weights, with an NLL term"
    assert built.citations() == (
        *(ADADPO, citations.SIMPO, citations.DPO, citations.MPO),
        *(citations.WPO, citations.RPO),
    )
    other = objectives.DPO(f_divergence_type="forward_kl")
    assert other.citations() == (citations.DPO, citations.F_DPO)


def test_an_objective_of_ones_own_cites_what_it_declares():
    mine = Paper("me2026", "Mine", "Me", 2026, url="https://example.org")

    class Mine(objectives.Contrastive):
        papers = (mine,)

        def __init__(self, adaptive=None) -> None:
            super().__init__()
            self.set_options(adaptive=adaptive)

    assert Mine().citations() == (mine,) and Mine().title == "Mine"
    adaptive = Mine(objectives.Adaptive())
    assert adaptive.citations() == (ADADPO, mine) and adaptive.title == "AdaMine"

    class Unsaid(objectives.Objective):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    assert Unsaid().citations() == ()
