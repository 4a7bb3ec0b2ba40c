"""Links lead somewhere; examples are examples; the reference is complete."""

from __future__ import annotations

import configparser
import importlib.util
import re

import pytest
from documented import PAGES, ROOT, blocks, files, page, programs

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
MODULE = re.compile(r"(?<![\w./])qubes_(?:itests|storage)(?:\.[a-z_0-9]+)+")
REFERENCE = {
    module
    for path in (ROOT / "docs/reference").glob("*.rst")
    for module in re.findall(r"automodule:: (\S+)", path.read_text())
}
#: Packages of which every module is for others to use.
PUBLIC = (
    "qubes_itests/balancing",
    "qubes_itests/conformance",
    "qubes_itests/core",
    "qubes_itests/core/device",
    "qubes_itests/core/network",
    "qubes_itests/core/policy",
    "qubes_itests/core/store",
    "qubes_itests/core/vm",
    "qubes_itests/fixtures",
    "qubes_itests/portal",
    "qubes_itests/qmemman",
    "qubes_itests/qmemman/simulation",
    "qubes_itests/testcase",
    "storage/qubes_storage",
)


def anchors(name):
    """Return the anchors that a forge gives a page's headings."""
    titles = HEADING.findall(FENCED.sub("", page(name)))
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    for link in LINK.findall(FENCED.sub("", page(name))):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.relative_to(ROOT))), link


def test_links_are_found():
    """So that the test above cannot pass for want of any."""
    assert sum(len(LINK.findall(page(name))) for name in PAGES) > 50
    assert "in-your-tests" in anchors("docs/qmemman.md")


@pytest.mark.parametrize("name", PAGES)
def test_every_page_can_be_found(name):
    """The README leads to each page, and to the list of decisions."""
    others = ("README.md", "docs/index.md", "docs/decisions/0")
    if not name.startswith(others):
        assert f"({name}" in page("README.md")


@pytest.mark.parametrize("name", PAGES)
def test_examples_are_files_or_programs(name):
    """What stands in a block of Python compiles; what is an excerpt is indented."""
    for text in blocks(name, "python"):
        compile(text, name, "exec")
    assert len(files(name)) + len(programs(name)) == len(blocks(name, "python"))


def test_release_notes_say_something_and_are_no_lists():
    """Each is an item of one."""
    fragments = [*(ROOT / "changes").glob("*.md")]
    assert len(fragments) > 5
    for path in fragments:
        text = path.read_text().strip()
        assert text, path
        assert not text.startswith(("-", "*")), path


def test_each_test_that_shows_a_promise_is_there():
    """And each row of a table of promises names one."""
    text = page("docs/security.md")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| promise ")]
    assert len(promises) > 20
    for row in promises:
        assert "`tests/" in row.split(" | ")[-1], row
    for name in set(re.findall(r"`(tests/[^`]+)`", text)):
        has_tests = "def test_" in (ROOT / name).read_text()
        assert has_tests or name.startswith("tests/benchmarks/"), name


@pytest.mark.parametrize("name", PAGES)
def test_files_that_pages_name_are_there(name):
    """By their paths in the repository or, of modules, in the package."""
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|c|h))`", page(name)):
        homes = (ROOT, ROOT / "qubes_itests")
        assert any((home / path).exists() for home in homes), path


def test_the_table_of_layers_has_those_of_the_contract():
    """And no others."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / "setup.cfg")
    layers = contract["importlinter:contract:layers"]["layers"]
    section = page("docs/concepts.md").partition("## Layers")[2].partition("\n## ")[0]
    names = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    in_table = {name for cell in names for name in re.findall(r"`(\w+)`", cell)}
    assert in_table - {"qubes_storage"} == set(re.findall(r"\w+", layers))


def test_each_step_of_a_start_is_explained():
    text = page("docs/troubleshooting.md")
    (table,) = re.findall(r"^\| it could not .*?\n\n", text, re.DOTALL | re.MULTILINE)
    explained = {
        step.strip()
        for row in table.strip().splitlines()[2:]
        for step in row.split("|")[1].split(",")
    }
    sources = [*ROOT.glob("qubes_itests/core/vm/*.py")]
    sources += ROOT.glob("qubes_itests/guest/start/*.py")
    pattern = r'(?:with step\(|self\.step = |self\._begin\()"([^"]+)"'
    steps = {s for path in sources for s in re.findall(pattern, path.read_text())}
    assert len(steps) > 5
    assert explained == steps


@pytest.mark.parametrize("package", PUBLIC)
def test_the_reference_has_all_modules(package):
    folder = ROOT / package
    assert (folder / "__init__.py").exists()
    dotted = package.removeprefix("storage/").replace("/", ".")
    for path in folder.glob("[!_]*.py"):
        assert f"{dotted}.{path.stem}" in REFERENCE


def test_the_reference_has_no_others():
    for module in REFERENCE:
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("name", PAGES)
def test_modules_that_pages_name_are_in_the_reference(name):
    """A name of something in a module is that module's."""
    for words in MODULE.findall(page(name)):
        head = words.rpartition(".")[0]
        assert REFERENCE & {words, head}, words
