"""What users see of a core, described, and how it differs in another one."""

from __future__ import annotations

from qubes_itests.comparison.differences import Difference, compare

__all__ = ["Difference", "compare"]
