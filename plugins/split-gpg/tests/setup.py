"""The distribution of the split-gpg tests."""

from setuptools import setup

setup(
    name="qubes-split-gpg",
    version="1.0",
    description="Integration tests of gpg with its keys in another Qubes VM",
    license="LGPL-2.1-or-later",
    packages=["qubes_split_gpg"],
    entry_points={
        "qubes.tests.extra.for_template": [
            "split-gpg = qubes_split_gpg.tests:list_tests"
        ],
    },
)
