"""What programs of the core show of logs."""

import logging

import pytest

from qubes_itests.core.log import Formatter, enable, get_vm_logger


@pytest.mark.parametrize(
    ("debug", "expected"),
    [
        (False, "INFO: vm.work: hello 1"),
        (True, "INFO: [MainProcess spot.None:7] vm.work: hello 1"),
    ],
)
def test_a_line_names_the_vm(debug, expected):
    name = get_vm_logger("work").name
    record = logging.LogRecord(name, logging.INFO, "spot.py", 7, "hello %d", (1,), None)
    assert Formatter(debug=debug).format(record) == expected
    record.name = "app"
    assert ("app" in Formatter(debug=debug).format(record)) is debug


def test_it_is_set_up_once(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        # the real one has handlers of pytest
        patch.setattr(logging, "root", root := logging.RootLogger(logging.WARNING))
        enable(logging.DEBUG)
        enable(logging.ERROR)
    assert (root.level, len(root.handlers)) == (logging.DEBUG, 1)
    root.debug("where")
    assert "test_log_formats.test_it_is_set_up_once:" in capsys.readouterr().err
