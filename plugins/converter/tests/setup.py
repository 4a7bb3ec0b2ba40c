"""The distribution of the converter's tests."""

from setuptools import setup

setup(
    name="qubes-converter",
    version="1.0",
    description="Integration tests of images that a disposable Qubes VM converts",
    license="LGPL-2.1-or-later",
    packages=["qubes_converter"],
    entry_points={
        "qubes.tests.extra.for_template": [
            "converter = qubes_converter.tests:list_tests"
        ],
    },
)
