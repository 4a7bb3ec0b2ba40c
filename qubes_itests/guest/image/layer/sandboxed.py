"""Process that makes layers in a sandbox, and ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.exc import HarnessError
from qubes_itests.guest.exc import LayerError
from qubes_itests.guest.image.layer.build import Builder, find_layers
from qubes_itests.guest.image.layer.request import Layers
from qubes_itests.host import sandbox
from qubes_itests.host.cache import Cache
from qubes_itests.host.command import started
from qubes_itests.host.confined import FOLLOW_US
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["build_layers", "main"]

_TAIL: Final = 2000
#: Seconds that the builder has to end after its last word.
_END_TIMEOUT: Final = 10.0


def build_layers(
    cache: Cache, layers: Layers, log: Path, say: Callable[[str], None]
) -> Path:
    """Return the root image of a template with layers, built on first use. Blocking.

    :param cache: where images are kept.
    :param layers: what it is made of.
    :param log: a file for what programs say, made when one does.
    :param say: called with a short phrase when another step begins.
    :raise LayerError: a layer does not build; names the log.
    """
    if (found := find_layers(cache, layers)) is not None:
        return found
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    program: list[str | Path] = [sys.executable, "-P", "-m", __name__, cache.root, log]
    with (
        tempfile.TemporaryFile() as errors,
        started(
            [*FOLLOW_US, *sandbox.command(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # that of the interpreter, which finds our package by it
            environment=os.environ,
            # so that it takes away what it has half built
            ending=signal.SIGTERM,
        ) as process,
    ):
        answer = _converse(process, layers, say)
        # It has said all. What does not end is killed when the context does.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_TIMEOUT)
        errors.seek(0)
        said = safe_text(errors.read()[-_TAIL:], lines=True, limit=None)
    if answer is None:
        raise LayerError(layers.template, "build it", "the builder ended", said)
    if "image" in answer:
        log.unlink(missing_ok=True)  # it is in the cache, beside the image
        return Path(answer["image"])
    step, reason, output = answer["problem"]
    raise LayerError(layers.template, step, reason, output, log)


def _converse(
    process: subprocess.Popen[bytes], layers: Layers, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Tell the builder what to do, and return its last word, if it has one."""
    assert process.stdin is not None  # noqa: S101 - as it was started
    assert process.stdout is not None  # noqa: S101
    with process.stdin:
        process.stdin.write(layers.to_json().encode())
    answer = None
    # until it has closed its end, which it does last: a word before that may not be its
    # last one
    for line in process.stdout:
        answer = json.loads(line)
        if "say" in answer:
            say(answer["say"])
            answer = None
    return answer


def main(arguments: list[str]) -> int:
    """Build what standard input asks for; answer in lines of JSON.

    :param arguments: the cache's directory, and the log.
    """
    sandbox.reexec()
    root, log = map(Path, arguments)

    def tell(**values: object) -> None:
        print(json.dumps(values), flush=True)  # noqa: T201

    layers = Layers.from_json(sys.stdin.read())
    try:
        builder = Builder(Cache(root), layers, log, lambda text: tell(say=text))
        tell(image=str(builder.build()))
    except LayerError as error:
        tell(problem=[error.step, error.why, error.output])
    except (HarnessError, OSError) as error:
        tell(problem=["build it", str(error), ""])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
