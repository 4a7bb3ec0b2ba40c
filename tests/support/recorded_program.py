"""Runs a program of dom0 for a tool of the client, and writes down how.

Called as ``recorded_program.py DIRECTORY PROGRAM ARGUMENTS``.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

began = time.monotonic()
directory, program, *words = sys.argv[1:]
recorded = {"stdin": b"", "stdout": b"", "stderr": b""}
process = subprocess.Popen(
    [program, *words],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    bufsize=0,
)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _frame: process.send_signal(number))


assert process.stdin is not None
assert process.stdout is not None
assert process.stderr is not None
stdin = process.stdin


def copy(name, source, target):
    while data := os.read(source, 65536):
        recorded[name] += data
        while data:
            data = data[os.write(target, data) :]


def feed():
    try:
        copy("stdin", 0, stdin.fileno())
    except OSError:
        return  # it reads no more
    stdin.close()


threading.Thread(target=feed, daemon=True).start()
outputs = [
    threading.Thread(target=copy, args=("stdout", process.stdout.fileno(), 1)),
    threading.Thread(target=copy, args=("stderr", process.stderr.fileno(), 2)),
]
for thread in outputs:
    thread.start()
for thread in outputs:
    thread.join()
status = process.wait()
path = Path(program)
call = {
    "program": f"{path.parent.name}/{path.name}",
    "arguments": [os.fsencode(word).decode("latin-1") for word in words],
    "environment": {
        name: value for name, value in os.environ.items() if name.startswith("QREXEC_")
    },
    "input": recorded["stdin"].decode("latin-1"),
    "status": status,
    "stdout": recorded["stdout"].decode("latin-1"),
    "stderr": recorded["stderr"].decode("latin-1"),
}
descriptor, name = tempfile.mkstemp(dir=directory)
with os.fdopen(descriptor, "w") as file:
    json.dump([began, call], file)
os._exit(status)
