"""``transformers serve`` with our attention: ``python -m attnkit.hf.serve MODEL``, and its options besides.

Transformers refuses ``transformers serve --attn-implementation attnkit``: it knows a list of names, and nothing would
register ours in that process. So this starts the same server and sets the attention of the model it has loaded.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

import typer
from transformers.cli.serve import Serve as _Theirs

from attnkit.hf.continuous import enter
from attnkit.hf.register import register

NAME = "attnkit"


class Serve(_Theirs):
    """The server of Transformers, whose model runs our attention; with ``continuous_batching`` on its pages.

    Takes the options of ``transformers serve``. The model has to be named, since one that a request names would be
    loaded without us, and ``attn_implementation`` left out or "attnkit".

    Raises
    ------
    ValueError: no model, or another attention. NotImplementedError: a model whose layers cannot be batched, see
    ``continuous_batching``.
    """

    __signature__ = inspect.signature(_Theirs)

    def __init__(self, *args: Any, **options: Any) -> None:
        asked, waits = options.pop("attn_implementation", None), not options.pop("non_blocking", False)
        if asked not in (None, NAME):
            raise ValueError(
                f"serve got attn_implementation {asked!r}, expected {NAME!r}: use transformers serve for others"
            )
        if not (args or options.get("force_model")):
            raise ValueError("serve got no model, expected one: python -m attnkit.hf.serve MODEL")
        register(NAME)
        options["non_blocking"] = True
        super().__init__(*args, **options)
        try:
            for loaded in self._model_manager.loaded_models.values():
                model = cast(Any, loaded.model)
                model.set_attn_implementation(NAME)
                if options.get("continuous_batching"):
                    enter(model)
            if waits:
                self._thread.join()
        except BaseException:
            self.kill_server()  # type: ignore[no-untyped-call]
            raise


def main() -> None:
    """The command line: what is refused ends in one sentence."""
    try:
        typer.run(Serve)
    except (ValueError, NotImplementedError) as error:
        sys.exit(f"attnkit: {error}")


if __name__ == "__main__":
    main()
