"""Settings every test shares: threads, random numbers, no choice of backend left over from a shell."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

# Read when attnkit is imported: a default left over in a shell would run one backend under every name.
os.environ.pop("ATTNKIT_BACKEND", None)

import hypothesis
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from attnkit import native

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = max(1, CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
# Workers and the processes they start share the cores instead of fighting for them.
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)
# The same examples every time: what is green stays green on the same source.
hypothesis.settings.register_profile("attnkit", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("attnkit")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test sees the same random numbers whichever tests ran before it."""
    torch.manual_seed(0)


ROOT = Path(__file__).parents[1]
LONGEST = 1800  # seconds of one test with --full
LIVES, STEPS, SHARES = 2000, 100, 4
"""Of a state machine with ``--full``; several processes can each take a share."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="only the tests that make random calls, with many times as many (hours). What has passed is not run again "
        "until its file or the package changes: stop at will, and start again (--cache-clear forgets)",
    )


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the long run is wanted; a test that asks for this is one that ``--full`` runs."""
    return bool(request.config.getoption("full"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "share" in metafunc.fixturenames:
        metafunc.parametrize("share", range(SHARES) if metafunc.config.getoption("full") else [0])


Live = Callable[..., None]


@pytest.fixture
def live(full: bool, share: int) -> Live:
    """Random lives of a state machine: so many of so many steps, or all those of a share of the long run."""

    def run(machine: type[RuleBasedStateMachine], count: int, steps: int = 30) -> None:
        if full:
            count, steps = LIVES // SHARES, STEPS
            machine = hypothesis.seed(share)(type(machine.__name__, (machine,), {}))
        how = hypothesis.settings(max_examples=count, stateful_step_count=steps)
        run_state_machine_as_test(machine, settings=how)

    return run


@functools.cache
def digest(file: Path) -> str:
    """Of all that a test's result depends on: the package, its kernels, this file and the test's own."""
    package = sorted(path for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".so", ".dylib"))
    found = hashlib.sha256()
    for path in (*package, Path(__file__), file):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


class Passed:
    """The tests that have passed with ``--full``: files of seconds and names, one for each state of a test's file."""

    def __init__(self, config: pytest.Config) -> None:
        self.folder = config.cache.mkdir("full")
        self.writes = not hasattr(config, "workerinput")  # xdist's workers report to the process that started them

    def record(self, nodeid: str) -> Path:
        file = ROOT / nodeid.partition("::")[0]
        return self.folder / f"{file.stem}-{digest(file)}.txt"

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        random = [item for item in items if "full" in getattr(item, "fixturenames", ())]
        records = {self.record(item.nodeid) for item in random}
        lines = [line for file in records if file.exists() for line in file.read_text().splitlines()]
        passed = {line.partition(" ")[2] for line in lines}
        left = {item.nodeid: item for item in random if item.nodeid not in passed}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in left])
        items[:] = left.values()
        for item in items:
            item.add_marker(pytest.mark.timeout(LONGEST))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.writes and report.when == "call" and report.passed:
            with self.record(report.nodeid).open("a") as opened:
                opened.write(f"{report.duration:.1f} {report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("ATTNKIT_REQUIRE_NATIVE") == "1" and not native.STATUS.available:
        pytest.exit(f"ATTNKIT_REQUIRE_NATIVE is set, but {native.STATUS.reason}", returncode=4)
    if config.getoption("full"):
        config.pluginmanager.register(Passed(config))


def pytest_report_header() -> str:
    if not native.STATUS.available:
        return f"native kernels: none, {native.STATUS.reason}"
    return f"native kernels: {native.STATUS.level} of {', '.join(native.STATUS.levels)}; torch {torch.__version__}"
