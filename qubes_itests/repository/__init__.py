"""Apps: repositories that say what their tests need in a guest, and bring the tests.

A repository declares templates in its setup.cfg or pyproject.toml (`read_specs`), of
which `derive` makes layers over those that there are. Its plugin is installed into an
separate environment (`install`).
"""

from __future__ import annotations

from qubes_itests.repository.derive import Derived, derive
from qubes_itests.repository.environment import (
    Environment,
    InstallError,
    Project,
    find_projects,
    install,
)
from qubes_itests.repository.spec import (
    SpecError,
    TemplateSpec,
    read_spec_file,
    read_specs,
)

__all__ = [
    "Derived",
    "Environment",
    "InstallError",
    "Project",
    "SpecError",
    "TemplateSpec",
    "derive",
    "find_projects",
    "install",
    "read_spec_file",
    "read_specs",
]
