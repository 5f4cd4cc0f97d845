"""What attnkit tests its mechanisms with, for anyone who writes one.

``laws.check(spec, backend)`` runs every law that a mechanism's record promises; ``budgets.assert_within`` is the one
tolerance; ``samplers`` draws calls; ``mutants`` are wrong programs that a suite has to notice. Nothing here is needed
to *use* attnkit.
"""

from __future__ import annotations

from attnkit.testing.budgets import assert_within
from attnkit.testing.lanes import Lane, lanes
from attnkit.testing.runs import assert_gradients_match, assert_matches

__all__ = ["Lane", "assert_gradients_match", "assert_matches", "assert_within", "lanes"]
