"""``kill -9`` of `serve`, over and over, while clients change VMs; what is wrong then.

Run: ``.venv/bin/python tests/benchmarks/kills.py KILLS [SEED]``; the status is 1 if
anything was lost, a VM had no volumes, or a volume no VM.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from server_kills import kill_again_and_again

KILLS = 200


def main(kills=KILLS, seed=1):
    with tempfile.TemporaryDirectory() as directory:
        findings = kill_again_and_again(
            os.environ, Path(directory) / "state", seed=int(seed), kills=int(kills)
        )
    print(findings)
    print(*findings.wrong, sep="\n")
    return 1 if findings.wrong or findings.kills < int(kills) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
