"""What dom0 has that is a VM with a domain of its own elsewhere."""

from __future__ import annotations

import pytest

from qubes_itests.core import exc


def test_changes_of_its_database_are_told_to_who_watches(app):
    dom0, heard = app.domains["dom0"], []
    for path in ("/one", "/all/"):
        dom0.watch_qdb_path(path)
        dom0.add_handler(
            f"domain-qdb-change:{path}",
            lambda _, event, path: heard.append((event.partition(":")[2], path)),
        )
    database = dom0.untrusted_qdb
    for path in ("/one", "/two", "/one/more", "/all/a"):
        database.write(path, "text")
    database.write("/all/b", b"\0bytes")
    assert heard == [("/one", "/one"), ("/all/", "/all/a"), ("/all/", "/all/b")]
    assert database.read("/two") == b"text"
    assert database.multiread("/all/") == {"/all/a": b"text", "/all/b": b"\0bytes"}
    heard.clear()
    database.rm("/all/")
    database.rm("/none")
    assert heard == [("/all/", "/all/a"), ("/all/", "/all/b")]
    assert database.list("/") == ["/one", "/two", "/one/more"]


def test_its_domain_is_that_of_the_machine(app):
    domain = app.domains["dom0"].libvirt_domain
    assert (domain.ID(), domain.name(), domain.isActive()) == (0, "Domain-0", 1)


@pytest.mark.asyncio
async def test_it_runs_as_long_as_the_machine(app):
    """With the arguments that starts of other VMs take."""
    dom0 = app.domains["dom0"]
    with pytest.raises(exc.QubesVMNotHaltedError):
        await dom0.start(False, None, 1)
    with pytest.raises(exc.QubesVMError):
        await dom0.shutdown(True)
    far = app.add_new_vm("RemoteVM", name="far", label="red")
    with pytest.raises(exc.QubesVMNotHaltedError, match="another machine"):
        await far.start(start_guid=False)


def test_it_is_in_backups_and_keeps_what_is_installed(app):
    dom0 = app.domains["dom0"]
    assert (dom0.include_in_backups, dom0.updateable) == (True, True)
    dom0.include_in_backups = "no"
    assert dom0.include_in_backups is False
    far = app.add_new_vm("RemoteVM", name="far", label="red")
    assert far.include_in_backups is False


def test_extensions_have_a_log(app, caplog):
    app.log.warning("of an extension")
    assert "of an extension" in caplog.text
