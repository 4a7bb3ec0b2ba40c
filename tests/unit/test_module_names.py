"""The names of test modules: pytest takes no two of one name, even in other folders."""

from collections import Counter
from pathlib import Path


def test_no_two_modules_have_one_name():
    names = Counter(path.name for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [name for name, number in names.items() if number > 1] == []
