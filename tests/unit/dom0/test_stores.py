"""XenStore and QubesDB."""

import select
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.dom0.shared_database import read_entries
from qubes_itests.dom0.stores import QubesDB, Watch, XenStore


def test_a_xenstore_is_a_tree_of_bytes():
    store = XenStore()
    store.write("/vm/1/name", "work")
    store.write("backend/pci/3/0", b"x")  # below dom0's own
    assert store.read("/vm/1/name") == b"work"
    assert store.read("/local/domain/0/backend/pci/3/0") == b"x"
    assert (store.read("/vm/1"), store.read("/vm/2")) == (b"", None)
    assert (store.names("/vm"), store.names("/none")) == (["1"], None)
    assert store.names("backend/pci") == ["3"]
    store.remove("/vm/1")
    assert (store.names("/vm"), store.read("/vm/1/name")) == (None, None)


def test_watches_of_a_xenstore():
    """They fire once at first, for what is below as well, and until they are ended."""
    store, seen = XenStore(), []
    end = store.watch("/local/domain/3/memory", seen.append)
    store.watch("@introduceDomain", seen.append)
    store.write("/local/domain/3/memory/meminfo", "1")
    store.write("/local/domain/3/memory-of", "1")
    store.announce("@introduceDomain")
    store.remove("/local/domain/3")
    end()
    store.write("/local/domain/3/memory/meminfo", "2")
    assert seen == [
        "/local/domain/3/memory",
        "@introduceDomain",
        "/local/domain/3/memory/meminfo",
        "@introduceDomain",
        "/local/domain/3/memory/meminfo",
    ]


def readable(watch):
    return bool(select.select([watch.reader], [], [], 0)[0])


def test_a_watch_tells_what_has_changed_below_its_paths_in_order():
    database, watch = QubesDB(), Watch()
    database.watches.append(watch)
    watch.paths |= {"/dir/", "/one"}
    for path in ("/dir", "/other", "/one", "/dir/a"):
        database.write(path, b"1")
    database.remove("/dir/")
    assert [watch.take() for _ in range(2)] == ["/one", "/dir/a"]
    assert not readable(watch)
    database.write("/one", b"2")
    database.disconnect()
    assert watch.take() == "/one"
    assert readable(watch)
    assert watch.take() is None
    assert not readable(watch)
    watch.close()


def test_a_guest_that_changes_much_holds_up_nobody():
    """Its changes are noted on the event loop, while their reader may be busy."""
    database, watch = QubesDB(), Watch()
    database.watches.append(watch)
    watch.paths.add("/one")

    def change():
        for number in range(70_000):
            database.take_over("/one", database.read("/one"), b"%d" % number)

    # one that is held up does not keep the process from ending
    guest = threading.Thread(target=change, daemon=True)
    guest.start()
    guest.join(300)
    assert not guest.is_alive()
    assert watch.take() == "/one"
    assert not readable(watch)
    watch.close()


def test_what_dom0_writes_is_passed_on_to_the_guest():
    database, passed = QubesDB(), []
    database.write("/before", b"1")
    database.pass_on = lambda path, value: passed.append((path, value))
    database.write("/name", b"work")
    database.remove("/before")
    assert passed == [("/name", "work"), ("/before", None)]
    assert database.texts() == {"/name": "work"}
    database.disconnect()
    database.write("/late", b"1")
    assert len(passed) == 2


@pytest.mark.parametrize("value", [b"guest", None])
def test_what_a_guest_has_changed_is_taken_over_unless_dom0_has_written_since(value):
    database, watch, passed = QubesDB(), Watch(), []
    database.write("/one", b"1")
    database.write("/two", b"2")
    database.watches.append(watch)
    watch.paths.add("/")
    database.pass_on = lambda path, value: passed.append((path, value))
    for path in ("/one", "/two"):
        database.take_over(path, b"1", value)
    assert (database.read("/one"), database.read("/two")) == (value, b"2")
    assert watch.take() == "/one"
    assert not readable(watch)
    # it is the guest that it comes from
    assert passed == []
    watch.close()


LINES = st.text(st.characters(codec="ascii"), max_size=9)


@given(st.dictionaries(st.from_regex("/[a-z./!=-]{0,9}", fullmatch=True), LINES))
def test_entries_of_a_guest_are_read_as_they_are_printed(entries):
    # a value may look like other entries, which it can be taken for
    has = {p: v.encode() for p, v in entries.items() if "\n/" not in v}
    said = b"".join(b"%s = %s\n" % (p.encode(), v) for p, v in has.items())
    assert read_entries(said) == has
    assert read_entries(b"said\n" + said) == has
