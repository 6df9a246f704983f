"""The README agrees with the code: its example runs, its memory table is the script's, its files exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_memory_table_equals_the_output_of_the_script() -> None:
    from bench.memory import memory_table

    assert re.search(r"<!-- memory -->\n(.*)\n<!-- /memory -->", README, re.DOTALL).group(1) == memory_table()


def test_example_trains() -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    names: dict[str, object] = {}
    exec(example, names)
    assert float(names["loss"].detach()) < 7.0  # some training, and no divergence: ln 256 is 5.5
    assert names["optimizer"].state


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
