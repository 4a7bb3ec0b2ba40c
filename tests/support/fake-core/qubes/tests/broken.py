"""A suite that cannot be imported."""

import dogtail  # noqa: F401
