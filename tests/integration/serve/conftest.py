"""Servers, with the cache of the tests."""

import pytest
from served import Served


@pytest.fixture
def serve(site):
    """Return a function that makes a `Served` with these arguments."""
    return lambda *arguments: Served(site.environment, *arguments)


@pytest.fixture(scope="module")
def server(make_site, tmp_path_factory):
    """Give one server for a module, with a VM `work` that runs."""
    site = make_site(tmp_path_factory.mktemp("site"))
    with Served(site.environment) as served:
        client = served.client
        client.call(
            "admin.vm.Create.AppVM", argument="tiny", payload=b"name=work label=red"
        )
        client.call("admin.vm.Start", "work")
        yield served
