"""What is told of a plugin that cannot be run, in place of its tests."""

import pytest

from qubes_itests.exc import HarnessError
from qubes_itests.pytest_plugin.collection import ProblemItem

PROBLEM = "there is no module 'gone'"


@pytest.fixture
def item(request):
    return ProblemItem.from_parent(request.node.parent, name="plugin", text=PROBLEM)


def test_its_problem_is_all_that_is_told(item):
    with pytest.raises(HarnessError) as caught:
        item.runtest()
    assert item.repr_failure(caught) == PROBLEM


def test_an_error_of_what_ends_with_it_is_told_as_that(item):
    """As of a fixture of the session, if it is the last item."""
    with pytest.raises(HarnessError) as caught:
        raise HarnessError("a mount is left")
    assert "a mount is left" in item.repr_failure(caught)
