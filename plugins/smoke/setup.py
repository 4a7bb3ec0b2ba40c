"""The distribution of the smoke tests."""

from setuptools import setup

setup(
    name="qubes-smoke",
    version="1.0",
    description="Integration tests of what every Qubes VM must be able to do",
    license="LGPL-2.1-or-later",
    packages=["qubes_smoke"],
    entry_points={
        "qubes.tests.extra": ["smoke = qubes_smoke.system:list_tests"],
        "qubes.tests.extra.for_template": ["smoke = qubes_smoke.vm:list_tests"],
    },
)
