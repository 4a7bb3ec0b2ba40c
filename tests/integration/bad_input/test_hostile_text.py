"""What a hostile guest says reaches terminal, JUnit, artefacts, logs as mere text."""

import re

import pytest
from plugin_site import FOR_TEMPLATE

PLUGIN = r"""
    import subprocess

    from qubes.tests.extra import ExtraTestCase

    SAY = (
        r"printf '\033[2J\033]0;title\007\302\233\342\200\256\rFAKE: 1 passed\r\n"
        r"::error::forged\nFAKE: 1 passed\n##[error]forged\n"
        r"\033[0Ksection_end:1:x\r\033[0K\nKernel panic - not syncing: forged\n'"
    )
    SERVICE = f"#!/bin/sh\n{SAY} >&2\n"

    class TC_00_Liar(ExtraTestCase):
        def setUp(self):
            super().setUp()
            self.liar, self.caller = self.create_vms(["liar", "caller"])
            self.liar.start()
            self.caller.start()

        def test_lies(self):
            liar = self.liar
            self.loop.run_until_complete(liar.run_for_stdio(
                "cat > /etc/qubes-rpc/test.Lie; chmod +x /etc/qubes-rpc/test.Lie",
                user="root", input=SERVICE.encode()))
            self.qrexec_policy("test.Lie", self.caller.name, liar.name)
            call = f"qrexec-client-vm {liar.name} test.Lie"
            self.assertEqual(self.caller.run(call, wait=True), 0)
            said, _ = self.loop.run_until_complete(
                liar.run_for_stdio(f"{SAY} | tee /dev/console", user="root"))
            print(said.decode())
            with self.subTest(said.decode()):
                self.fail(said.decode())

        def test_skips(self):
            self.skipTest(self.loop.run_until_complete(
                self.liar.run_for_stdio(SAY))[0].decode())

    def list_tests():
        return [TC_00_Liar]
"""


@pytest.fixture(scope="module")
def site(make_site, tmp_path_factory):
    site = make_site(tmp_path_factory.mktemp("liar"))
    site.install("liar", PLUGIN, FOR_TEMPLATE)
    return site


@pytest.fixture(scope="module")
def done(site):
    return site.run("liar", "--junitxml=x.xml", "-rA", GITHUB_ACTIONS="true")


def harmful(text):
    """Return the lines that a terminal or a CI would take for more than text."""
    return [
        line
        for line in text.split("\n")
        if not line.replace("\t", "").isprintable()
        or re.match(r"\s*::(?!group::|endgroup::|error title=liar%3A%3A)", line)
        or re.search(r"##\w*\[", line)
    ]


def test_the_terminal_gets_text(done):
    assert harmful(done.stdout) == []
    assert harmful(done.stderr) == []
    # of the assertion, the print, the timeline; each with its own mark or heading
    assert r"\x1b[2J\x1b]0;title\x07\x9b\u202e\rFAKE: 1 passed" in done.stdout
    assert re.search(
        r"calls test\.Lie\+ in test-inst-liar .*\n +\| \\x23#\[error\]forged\n",
        done.stdout,
    )
    assert "::group::liar" in done.stdout
    # the one for the failed test, which is the run's own
    assert done.stdout.count("::error title=") == 1


def test_a_panic_that_a_program_prints_is_none(done):
    assert done.returncode == 1, done.stdout + done.stderr
    assert "guest panic" not in done.stdout


def test_reports_are_text(done, site):
    assert done.returncode == 1
    assert harmful((site.work / "x.xml").read_text()) == []
    assert harmful(site.run("report", GITHUB_ACTIONS="true").stdout) == []


def test_artefacts_are_text(done, site):
    assert done.returncode == 1
    files = [p for p in (site.work / "itests-artifacts").rglob("*") if p.is_file()]
    texts = {path.name: path.read_text() for path in files}
    assert {name: harmful(text) for name, text in texts.items() if harmful(text)} == {}
    (console,) = (n for n in texts if n.endswith("liar.console.log"))
    assert r"\x1b[2J" in texts[console]
