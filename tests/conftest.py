"""Settings every test shares: threads, random numbers, no choice of backend left over from a shell."""

from __future__ import annotations

import os

# Read when attnkit is imported: a default left over in a shell would run one backend under every name.
os.environ.pop("ATTNKIT_BACKEND", None)

import hypothesis
import pytest
import torch

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="make ten to seventy times as many random calls (with --timeout=0)"
    )


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the long run is wanted."""
    return bool(request.config.getoption("full"))


def pytest_configure() -> None:
    if os.environ.get("ATTNKIT_REQUIRE_NATIVE") == "1" and not native.STATUS.available:
        pytest.exit(f"ATTNKIT_REQUIRE_NATIVE is set, but {native.STATUS.reason}", returncode=4)


def pytest_report_header() -> str:
    if not native.STATUS.available:
        return f"native kernels: none, {native.STATUS.reason}"
    return f"native kernels: {native.STATUS.level} of {', '.join(native.STATUS.levels)}; torch {torch.__version__}"
