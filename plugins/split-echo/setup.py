"""The distribution of the split-echo tests."""

from setuptools import setup

setup(
    name="qubes-split-echo",
    version="1.0",
    description="Integration tests of calls from one Qubes VM to another",
    license="LGPL-2.1-or-later",
    packages=["qubes_split_echo"],
    entry_points={
        "qubes.tests.extra.for_template": [
            "split-echo = qubes_split_echo.tests:list_tests"
        ],
    },
)
