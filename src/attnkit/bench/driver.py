"""Times calls of a package in a folder of its choice: run as a program by ``attnkit.bench.base``, never imported.

``driver.py PACKAGE BENCH SETTINGS`` takes attnkit from one folder and the bench from another, so that this bench, with
its cases, also times the kernels of commits that had no such bench.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def load(name: str, folder: Path) -> None:
    """Import a package from a folder, whatever else is installed under its name."""
    spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} has no package")
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def main(package: Path, bench: Path, settings: dict[str, object]) -> None:
    # The folder of this file would shadow other modules, and an editable install answers for every attnkit.* by itself.
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != bench.resolve()]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not hasattr(finder, "known_source_files")]
    load("attnkit", package)
    load("attnkit.bench", bench)
    import torch

    from attnkit import native
    from attnkit.bench import calls, sizes

    assert Path(native.__file__).is_relative_to(package), f"{native.__file__} is not of {package}"
    torch.set_num_threads(int(str(settings["threads"])))
    if native.STATUS.available:
        native.set_level(str(settings["level"]))
    cases = {(case.id, case.work): case for case in sizes.all_cases()}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    call = None
    for line in sys.stdin:
        question = json.loads(line)
        if "prepare" in question:
            call, refused = None, None
            try:
                call = calls.ours(cases[tuple(question["prepare"])])
                call()
            except NotImplementedError as error:
                refused = " ".join(str(error).split())
            print(json.dumps({"refused": refused}), flush=True)
        elif call is not None:
            start = clock()
            call()
            print(json.dumps({"seconds": clock() - start}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
