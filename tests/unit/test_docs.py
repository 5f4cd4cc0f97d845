"""What the README, the documentation and the examples tell people to type really runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(text: str) -> list[str]:
    """The fenced blocks of a Markdown text that are marked as Python."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def without_docstring(text: str) -> str:
    return re.sub(r'\A""".*?"""\n\n', "", text, flags=re.DOTALL)


BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(code_blocks(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_the_pages_runs(block: str) -> None:
    exec(compile(block, "<page>", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ["--steps", "3"] if "--steps" in path.read_text(encoding="utf-8") else []
    monkeypatch.setattr("sys.argv", [str(path), *quick])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_readme_shows_the_short_examples_and_names_those_that_train() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    texts = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES}
    training = [name for name, text in texts.items() if "--steps" in text]
    assert sorted(code_blocks(readme)) == sorted(
        without_docstring(text) for name, text in texts.items() if name not in training
    )
    assert all(f"(examples/{name})" in readme for name in training)
