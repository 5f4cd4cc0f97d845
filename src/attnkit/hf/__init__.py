"""The Hugging Face plug-in: one name under which Transformers runs our attention, and a cache for ``generate``.

Importing it changes nothing in Transformers; ``register()`` does, and ``unregister()`` takes it back.
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError("attnkit.hf needs Transformers, which is not installed: pip install 'attnkit[hf]'") from error

from attnkit.hf.accelerate import accelerate, restore
from attnkit.hf.batching import generate_batch
from attnkit.hf.cache import Cache
from attnkit.hf.continuous import continuous_batching
from attnkit.hf.register import register, unregister

__all__ = ["Cache", "accelerate", "continuous_batching", "generate_batch", "register", "restore", "unregister"]
