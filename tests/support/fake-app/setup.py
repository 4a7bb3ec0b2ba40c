"""A small app, for tests of ``--core`` with ``--app``."""

import setuptools

setuptools.setup(
    name="fake-app",
    version="1.0",
    py_modules=["fake_app"],
    entry_points={
        "qubes.tests.extra": ["my-app = fake_app:once"],
        "qubes.tests.extra.for_template": ["my-app = fake_app:for_template"],
    },
)
