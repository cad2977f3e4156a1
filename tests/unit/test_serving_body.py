"""Reading on after a refusal: long enough for an honest client, never longer than a moment."""

import asyncio

from zops.serving import body


def receiving(*messages, then_hang=False):
    left = list(messages)

    async def receive():
        if not left and then_hang:
            await asyncio.Event().wait()
        return left.pop(0)

    return receive, left


def piece(size=1, *, more=True):
    return {"type": "http.request", "body": bytes(size), "more_body": more}


def test_a_body_must_be_read_to_its_end():
    receive, left = receiving(piece(), piece(), piece(more=False), "never read")
    asyncio.run(body.discard_body(receive))
    assert left == ["never read"]


def test_a_client_that_left_must_not_be_waited_for():
    receive, left = receiving(piece(), {"type": "http.disconnect"}, "never read")
    asyncio.run(body.discard_body(receive))
    assert left == ["never read"]


def test_more_than_a_body_may_be_must_not_be_read():
    receive, left = receiving(*[piece(body.MAX_BODY_BYTES // 2) for _ in range(9)])
    asyncio.run(body.discard_body(receive))
    assert len(left) == 7


def test_a_client_that_sends_nothing_must_be_given_up_soon(monkeypatch):
    monkeypatch.setattr(body, "_DISCARD_S", 0.01)
    receive, _ = receiving(piece(), then_hang=True)
    asyncio.run(asyncio.wait_for(body.discard_body(receive), 5))
