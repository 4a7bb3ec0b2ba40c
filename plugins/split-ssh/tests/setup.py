"""The distribution of the split-ssh tests."""

from setuptools import setup

setup(
    name="qubes-split-ssh",
    version="1.0",
    description="Integration tests of ssh with its keys in another Qubes VM",
    license="LGPL-2.1-or-later",
    packages=["qubes_split_ssh"],
    entry_points={
        "qubes.tests.extra.for_template": [
            "split-ssh = qubes_split_ssh.tests:list_tests"
        ],
    },
)
