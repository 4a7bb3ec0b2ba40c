"""What the plugin loads before it is known whether this process runs any test."""

import subprocess
import sys

PROGRAM = """
import sys, qubes_itests.pytest_plugin
names = {name.partition(".")[2].partition(".")[0] for name in sys.modules
         if name.startswith("qubes_itests.")}
print(*sorted(names & {"core", "guest", "hypervisor", "repository", "report"}))
"""


def test_a_process_that_starts_over_in_a_sandbox_loads_nothing_for_tests():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
