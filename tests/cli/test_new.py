"""``attnkit new``: what it writes is tidy, and keeps the laws as soon as the definition is filled in."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkit import bench
from attnkit.cli import new
from attnkit.spec import LayerPlace, Mechanism, Sizes
from attnkit.testing import laws

ROOT = Path(__file__).resolve().parents[2]
FILES = ("__init__.py", "layer.py", "page.md", "reference.py")
NAME = "relu_kernel"
# A small mechanism: weights (1 + relu q)(1 + relu k), causal, normalised.
FILLED_IN = """\
    m, n = q.shape[2], k.shape[2]
    weights = ((1 + q.relu()) @ (1 + k.relu()).transpose(-1, -2)).tril(n - m)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, 0.0) @ v
"""


def fill_in(folder: Path) -> None:
    """Write the definition where the template has none."""
    path = folder / "reference.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index("    raise NotImplementedError")] + FILLED_IN, encoding="utf-8")


@pytest.fixture
def folder(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A scaffolded package that can be imported, and is forgotten afterwards."""
    assert run("new", NAME, "--out", tmp_path).code == 0
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / NAME
    for module in [module for module in sys.modules if module.partition(".")[0] == NAME]:
        del sys.modules[module]


def record() -> Mechanism:
    spec: Mechanism = importlib.import_module(NAME).SPEC
    return spec


def test_it_says_what_it_wrote_and_what_comes_next(run: Any, tmp_path: Path) -> None:
    done = run("new", NAME, "--out", tmp_path)
    wrote = [str(tmp_path / NAME / name) for name in FILES]
    assert sorted(map(str, (tmp_path / NAME).iterdir())) == wrote
    assert all(path in done.out for path in wrote)
    assert f'{NAME} = "{NAME}:SPEC"' in done.out
    found = run("new", "another", "--out", tmp_path, "--json").json
    assert found["files"] == [str(tmp_path / "another" / name) for name in FILES]
    assert len(found["next"]) == 5
    assert {path.name for path in tmp_path.iterdir()} == {NAME, "another"}


def test_before_it_is_filled_in_it_says_so(folder: Path) -> None:
    spec = record()
    with pytest.raises(NotImplementedError, match=r"write it in reference\.py"):
        spec.function(**spec.sample())
    assert (folder / "page.md").read_text(encoding="utf-8").startswith("# Relu kernel attention\n")


def test_filled_in_it_keeps_every_law(folder: Path) -> None:
    fill_in(folder)
    spec = record()
    tried = laws.check(spec, "reference", examples=2)
    assert tried["definition"] and tried["gradients"] and tried["head_order"]
    layer = spec.layer(spec.preset(NAME).configure(LayerPlace(width=32, heads=4)))
    assert layer(torch.randn(2, 5, 32)).shape == (2, 5, 32)
    assert spec.cost(Sizes(m=8, n=8)).flops > 0
    with pytest.raises(ValueError, match="width"):
        spec.layer(spec.preset(NAME).configure(LayerPlace(width=33, heads=4)))


def test_a_wrong_definition_breaks_a_law(folder: Path) -> None:
    fill_in(folder)
    path = folder / "reference.py"
    # Head h would read KV head h % g.
    text = path.read_text(encoding="utf-8")
    assert "repeat_interleave(shared, 1)" in text
    path.write_text(text.replace("repeat_interleave(shared, 1)", "repeat(1, shared, 1, 1)"), encoding="utf-8")
    with pytest.raises(AssertionError):
        laws.check(record(), "reference", examples=4)


@pytest.mark.parametrize("tool", [["check", "--select", "E,F,W,B,UP,N,RUF100"], ["format", "--check"]], ids=" ".join)
def test_it_passes_lint(folder: Path, tool: list[str]) -> None:
    pytest.importorskip("ruff", reason="ruff comes with the [dev] extra")
    settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *tool, *settings, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["", "Retention", "9lives", "two words", "a-b", "class", "../up", "ünder", "_x"])
def test_a_name_must_be_a_name(run: Any, tmp_path: Path, name: str) -> None:
    assert repr(name) in run("new", "--out", tmp_path, "--", name).error
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(run: Any, folder: Path) -> None:
    fill_in(folder)
    before = (folder / "reference.py").read_text(encoding="utf-8")
    assert "exists already" in run("new", NAME, "--out", folder.parent).error
    assert (folder / "reference.py").read_text(encoding="utf-8") == before


def test_outside_a_checkout_it_asks_for_a_folder(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "checkout", lambda: None)
    assert "--out" in run("new", NAME).error


def test_a_folder_that_cannot_be_written(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in run("new", NAME, "--out", tmp_path / "file").error


def test_a_disk_that_fills_up_leaves_nothing(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if path.name == "page.md":
            raise OSError(28, "No space left on device", str(path))
        return write(path, text, **options)

    monkeypatch.setattr(new.Path, "write_text", full)
    assert "No space left on device" in run("new", NAME, "--out", tmp_path).error
    assert list(tmp_path.iterdir()) == []


def test_in_a_checkout_every_tool_finds_it(process: Any, tmp_path: Path) -> None:
    package = tmp_path / "src" / "attnkit"
    shutil.copytree(bench.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # The finder of an editable install comes before every path and knows only the original.
    use_copy = f"""
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, {str(package.parent)!r})
"""
    made = process("new", NAME, before=use_copy)
    assert made.code == 0, made.err
    assert f"pytest -k {NAME}" in made.out
    fill_in(package / "mechanisms" / NAME)
    assert "Relu kernel attention" in process("list", before=use_copy).out
    doctor = process("doctor", "--json", before=use_copy).json
    assert {"mechanism": NAME, "backend": "reference", "state": "runs", "why": []} in doctor["backends"]
