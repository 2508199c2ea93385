"""Cards name whom to cite, by authors and title, as BibTeX that compiles."""

import re
from pathlib import Path

import pytest

import peftx
from peftx.cards import compressed
from peftx.cards.papers import PAPERS, citation, link

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "papers.md").read_text(encoding="utf-8")
SPECIAL = set("#$%&~_^\\")  # to TeX, outside of an address
METHODS = [info for info in peftx.methods() if info.config.__module__.startswith("peftx.")]  # the tests' own left out
OURS = {info.paper: info.config.__name__.removesuffix("Config") for info in METHODS}
OURS |= {paper: name for name, paper in compressed.PAPERS.items()}


def parsed(text: str) -> tuple[str, str, dict[str, str]]:
    """Type, key and fields of the one entry of a BibTeX file, read as BibTeX reads it: values in balanced braces."""
    head = re.match(r"@(\w+)\{([^\s,{}()\"#%'=~\\]+),\s*", text)
    assert head, text
    fields, at = {}, head.end()
    while text[at] != "}":
        name = re.compile(r"\s*(\w+)\s*=\s*\{").match(text, at)
        assert name and name[1] not in fields, text[at:]
        depth, start = 1, name.end()
        at = start
        while depth:  # an IndexError, where a brace is open
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        fields[name[1]] = text[start : at - 1]
        at = re.compile(r"\s*,?\s*").match(text, at).end()
    assert text[at + 1 :].strip() == ""
    return head[1], head[2], fields


def entry(section: list[str]) -> tuple[str, str, dict[str, str]]:
    (text,) = section
    return parsed(re.fullmatch(r"## Citation\n\n```bibtex\n(.*)\n```", text, re.DOTALL)[1])


@pytest.mark.parametrize("paper", sorted(OURS))
def test_each_paper_has_authors_and_title(paper: str) -> None:
    kind, key, fields = entry(citation(OURS[paper], paper))
    assert kind == "misc" and {"author", "title", "year", "eprint", "archivePrefix"} <= set(fields)
    assert fields["title"].startswith("{") and fields["eprint"] == paper.removeprefix("arXiv:")
    assert not SPECIAL & set(fields["author"] + fields["title"] + key)
    assert fields["year"] in key and fields["year"] == f"20{fields['eprint'][:2]}"
    names = fields["author"].split(" and ")
    assert all(re.fullmatch(r"[A-Z][^,]*, [A-Z][^,.]+|others", name) for name in names) and names[0] != "others"
    assert "others" not in names[:-1]
    people = [short(name) for name in names if name != "others"]
    named = (
        f"{people[0]} et al." if len(names) > 3 else " and ".join(filter(None, (", ".join(people[:-1]), people[-1])))
    )
    assert f"| {named}, *{fields['title'].strip('{}')}*, [{paper}]" in PAGE  # as people read it


def short(name: str) -> str:
    """`Huang, Jia-Hong` as people write it: J.-H. Huang."""
    family, given = name.split(", ")
    return re.sub(r"(\w)\w*", r"\1.", given) + f" {family}"


def test_keys_are_used_once() -> None:
    assert len({paper.key for paper in PAPERS.values()}) == len(PAPERS)


def test_a_paper_of_somebody_elses_method() -> None:
    _, key, fields = entry(citation("Mine", "arXiv:2601.00001"))
    assert key == "arXiv:2601.00001" and fields["title"] == "{Mine}" and fields["year"] == "2026"
    assert citation("Mine", "a talk") == ["## Citation\n\nMine: a talk"] and citation("Mine", "") == []
    assert link("a talk") == "a talk" and link("arXiv:1.2") == "[arXiv:1.2](https://arxiv.org/abs/1.2)"


def test_each_finished_card_cites_once() -> None:
    folder = Path(__file__).parents[2] / "model_cards"
    cards = {path.stem: path.read_text() for path in folder.glob("*.md") if path.stem not in ("README", "template")}
    papers = {variant: info.paper for info in METHODS for variant in info.variants}
    assert set(cards) - set(papers) == {"compressed"}
    for name, text in cards.items():
        _, _, fields = parsed(text.split("```bibtex\n")[1].split("```")[0])
        assert text.count("```bibtex") == 1 and "author" in fields
        assert f"arXiv:{fields['eprint']}" == papers.get(name, compressed.PAPERS["fwsvd"])
        if name != "compressed":
            assert text.split("\n---\n", 1)[1].startswith("## Labels\n\n0 `negative`, 1 `positive`")
            assert 'id2label={0: "negative", 1: "positive"}' in text
