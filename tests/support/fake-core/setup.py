"""A small core, in the shape of core-admin, for tests of ``--core``."""

import setuptools

setuptools.setup(
    name="qubes",
    version=open("version").read().strip(),
    packages=setuptools.find_packages(),
    entry_points={"qubes.storage": "file-reflink = qubes.storage.copying:CopyingPool"},
)
