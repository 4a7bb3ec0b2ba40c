"""Tables of device mapper that dom0 takes."""

import pytest

from qubes_itests.dom0.mapper import Mapper
from qubes_itests.dom0.stores import QubesDB


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("a", "0 8 crypt 7:0 0"),
        ("a", "0 8 linear 7:0"),
        ("a", "8 8 linear 7:0 0"),
        ("a", "0 8 linear ../../7:0 0"),
        ("a", "0 8 linear 7:0 0\n8 8 linear 7:1 0"),
        ("../a", "0 8 linear 7:0 0"),
        ("", "0 8 linear 7:0 0"),
    ],
)
def test_others_are_told_what_is_expected(name, table):
    mapper = Mapper(QubesDB())
    with pytest.raises(ValueError, match="expected a name, and a table"):
        mapper.create(name, table)
    with pytest.raises(ValueError, match=r"there is no device 'a'"):
        mapper.remove("a")
