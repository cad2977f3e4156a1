"""Ports as the kernel really hands them out."""

import socket

from zops.host.ports import why_not_bindable


def test_a_connection_that_is_left_over_must_not_make_the_port_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()
        client.close()
    assert why_not_bindable("127.0.0.1", port) == ""
