"""Unit tests talk to nobody: to connect to any address is an error."""

from collections.abc import Iterator

import pytest
from pytest_socket import _remove_restrictions, socket_allow_hosts


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    # An address that is none: an empty list would mean no restriction at all.
    socket_allow_hosts(["240.0.0.0"], allow_unix_socket=True)
    yield
    _remove_restrictions()
