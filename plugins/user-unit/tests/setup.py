"""The distribution of the user-unit tests."""

from setuptools import setup

setup(
    name="qubes-user-unit",
    version="1.0",
    description="Integration tests of a service that is a unit of the user's systemd",
    license="LGPL-2.1-or-later",
    packages=["qubes_user_unit"],
    entry_points={
        "qubes.tests.extra.for_template": [
            "user-unit = qubes_user_unit.tests:list_tests"
        ],
    },
)
