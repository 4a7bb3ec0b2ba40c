"""Outputs of guests in assertions and prints do no harm in a report."""

import subprocess
import sys
import textwrap

import pytest

PLUGIN = """
    from qubes_itests.report.safe_report import make_safe
    import pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(report):
        make_safe(report)
"""
TESTS = r"""
    import sys, unittest
    import pytest

    BAD = "\x1b[2J\x9b\u202e\r::error::a\n::error::b\nFAKE: 1 passed\n##[error]c"

    def test_assertion():
        assert BAD == ""

    def test_message(record_property):
        print(BAD)
        print(BAD, file=sys.stderr)
        record_property("said", BAD)
        raise ValueError(BAD)

    def test_chain():
        try:
            raise KeyError(BAD)
        except KeyError as error:
            raise ValueError(BAD) from error

    def test_skip():
        pytest.skip(BAD)

    def test_expected():
        pytest.xfail(BAD)

    def test_subtest(subtests):
        with subtests.test(BAD, said=BAD):
            print(BAD)
            raise ValueError(BAD)

    class TC(unittest.TestCase):
        def test_case(self):
            self.fail(BAD)
"""


@pytest.mark.parametrize("style", ["auto", "long", "short", "line", "native"])
def test_nothing_of_a_report_steers_a_terminal_or_a_ci(tmp_path, style):
    (tmp_path / "safe.py").write_text(textwrap.dedent(PLUGIN))
    (tmp_path / "test_bad.py").write_text(textwrap.dedent(TESTS))
    words = [
        "-p",
        "safe",
        "-rA",
        f"--tb={style}",
        "--junitxml=x.xml",
        "-c",
        "/dev/null",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "/dev/null", *words],
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
        check=False,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": ".",
            "LC_ALL": "C.UTF-8",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # they take longer than the tests
        },
    )
    shown = done.stdout.decode()
    assert "6 failed, 1 skipped" in shown, shown
    lines = (shown + (tmp_path / "x.xml").read_text()).split("\n")
    assert [line for line in lines if not line.replace("\t", "").isprintable()] == []
    assert [line for line in lines if line.lstrip().startswith("::")] == []
    assert [line for line in lines if "##[" in line] == []
    assert r"\x1b[2J" in shown
