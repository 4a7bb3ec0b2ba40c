"""The log of the server is bounded, and each record begins a line of its own."""

import logging
import os
import pty
import select
import sys
import termios
import threading

from qubes_itests.serve import daemon


def test_a_record_forges_no_other(tmp_path, capsys):
    with daemon._log(tmp_path / "log"):
        logging.getLogger("qubes").warning(
            "said: %s", "\x1b[2J\n2026 ERROR\r\n::error::x"
        )
    for text in ((tmp_path / "log").read_text(), capsys.readouterr().err):
        first, *others = text.splitlines()
        assert first.endswith(r"WARNING qubes: said: \x1b[2J")
        assert others == ["  | 2026 ERROR", r"  | \x3a:error::x"]


def test_the_log_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "_LONGEST_LOG", 10_000)
    with daemon._log(tmp_path / "log"):
        for number in range(1000):
            logging.getLogger("qubes").info("record %d %s", number, "x" * 100)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"log", "log.1"}
    assert max(sizes.values()) <= 10_000
    assert "record 999" in (tmp_path / "log").read_text()


def test_a_terminal_that_is_stopped_holds_up_nobody_who_logs(tmp_path, monkeypatch):
    """Ctrl-S: the event loop logs, and serves all clients."""
    # the terminal is closed when all has been written, however long that takes here
    monkeypatch.setattr(daemon, "_LAST_WORDS", 300)
    mine, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as output, os.fdopen(mine, "rb", 0) as shown:
        monkeypatch.setattr(sys, "stderr", output)
        termios.tcflow(theirs, termios.TCOOFF)
        try:
            logging_ = daemon._log(tmp_path / "log")
            logging_.__enter__()
            for number in range(3000):
                logging.getLogger("qubes").warning("record %d.", number)
        finally:
            termios.tcflow(theirs, termios.TCOON)
        ending = threading.Thread(target=logging_.__exit__, args=(None, None, None))
        ending.start()
        seen = b""
        while b"record 999." not in seen:
            seen += shown.read(4096)
        ending.join(300)
        assert not ending.is_alive()
    assert "record 2999." in (tmp_path / "log").read_text()


def test_a_terminal_that_is_stopped_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "_LAST_WORDS", 0.1)
    former = set(threading.enumerate())
    mine, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as output, os.fdopen(mine, "rb", 0) as shown:
        monkeypatch.setattr(sys, "stderr", output)
        termios.tcflow(theirs, termios.TCOOFF)
        try:
            with daemon._log(tmp_path / "log"):
                for number in range(3000):
                    logging.getLogger("qubes").warning("record %d.", number)
        finally:
            termios.tcflow(theirs, termios.TCOON)
        left = set(threading.enumerate()) - former
        assert left
        seen = b""
        while any(thread.is_alive() for thread in left):
            if select.select([shown], [], [], 0.1)[0]:
                seen += shown.read(4096)
        while b"record 999." not in seen:
            seen += shown.read(4096)
