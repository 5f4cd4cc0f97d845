"""Writes families.md, the table of what runs on the Transformers plug-in: ``python docs/family_table.py``.

The page is committed, because making it takes a minute; ``tests/hf/test_families.py`` says when it is out of date.
"""

from __future__ import annotations

import os
from pathlib import Path

PAGE = Path(__file__).parent / "families.md"
OPENING = """\
# Families of models

Each line is a tiny random model of a family, checked by [`attnkit parity`](parity.md) on
`attn_implementation="attnkit"` against the same weights in float64, with the rounding of Transformers' own
implementation as the budget. *yes*: the hidden states of every layer and the logits agree, and so do the gradients of
every layer. *refused*: it stops with the reason below. *–*: nothing in it is ours, or Transformers cannot do it either.

"""


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    import attnkit.hf
    from attnkit.parity.families import FAMILIES
    from attnkit.parity.support import page, support

    transformers.logging.set_verbosity_error()
    attnkit.hf.register()
    PAGE.write_text(OPENING + page(map(support, FAMILIES)), encoding="utf-8")


if __name__ == "__main__":
    main()
