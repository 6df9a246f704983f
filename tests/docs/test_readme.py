"""The README agrees with the code; files and headings that pages link to exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 150


def test_memory_table_equals_the_output_of_the_script() -> None:
    from bench.memory import memory_table

    assert re.search(r"<!-- memory -->\n(.*)\n<!-- /memory -->", README, re.DOTALL).group(1) == memory_table()


def test_example_trains(capsys: pytest.CaptureFixture[str]) -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    names: dict[str, object] = {}
    exec(example, names)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", capsys.readouterr().out, re.MULTILINE)]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(5.55, abs=0.3)  # ln 256: the loss of a uniform guess
    assert losses[-1] < 4.5
    assert names["optimizer"].state


def prose(page: str) -> str:
    """Return a page without fenced code."""
    return re.sub(r"^(```+).*?^\1", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: str) -> set[str]:
    """Return the anchors that the site gives to a page's headings, and those of documented names."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\]\([^)]*\)|[^\w\s-]", "", heading.encode("ascii", "ignore").decode())
        slug = re.sub(r"[-\s]+", "-", text.strip().lower())
        found.add(next(name for i in range(99) if (name := f"{slug}_{i}" if i else slug) not in found))
    return found | set(re.findall(r"^::: (\S+)$", prose(page), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), f"{page} links to {target}"
        if anchor:
            name = linked.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(name), f"{page} links to {target}, a heading that {name} does not have"


def test_anchors_are_those_of_the_site() -> None:
    toc = pytest.importorskip("markdown.extensions.toc", reason="the site's tools are not installed")
    for page in PAGES:
        for heading in re.findall(r"^#+ ([^`\[\n]+)$", prose(page), re.MULTILINE):
            assert toc.slugify(heading, "-") in anchors(page)
