"""The log of the server is bounded, and each record begins a line of its own."""

import logging

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
