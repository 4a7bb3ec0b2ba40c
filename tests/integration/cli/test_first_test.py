"""``init``: what it writes passes when it is run at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ITESTS = Path(sys.executable).with_name("itests")


def test_the_first_test_of_an_app_passes(site):
    app = site.work / "my app"
    app.mkdir()
    # a module of that name there is none of ours
    (app / "platform.py").write_text("raise RuntimeError\n")

    def run(*words):
        return subprocess.run(
            [ITESTS, *words],
            cwd=app,
            env=site.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=site.timeout,
            check=False,
        )

    written = run("init")
    assert written.returncode == 0, written.stderr
    assert "Run the tests: itests --app .\n" in written.stdout
    done = run("--app", ".")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED  my-app::TC_00_Calls_tiny::test_010_work_asks_vault" in done.stdout
    assert "2 passed" in done.stdout
