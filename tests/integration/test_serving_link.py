"""The pipe to a worker, with a real process at its other end."""

import asyncio
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import pytest

from zops.serving.link import WorkerLink, close_all
from zops.serving.messages import Cancel

# Answers each message with itself, until it is told to go or its pipe ends.
ECHO = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
connection.send("here")
try:
    while (message := connection.recv()).picture != "go":
        connection.send(message)
except EOFError:
    pass
"""
DEAF = """
import signal, sys, time
from multiprocessing.connection import Connection
Connection(int(sys.argv[1])).send("here")
time.sleep(600)
"""


class Listener:
    """What the event loop hears of one worker."""

    def __init__(self, link):
        self.heard, self.lost = [], 0
        self._news = asyncio.Event()
        link.listen(asyncio.get_running_loop(), self._message, self._lost)

    def _message(self, message):
        self.heard.append(message)
        self._news.set()

    def _lost(self):
        self.lost += 1
        self._news.set()

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition(self):
                self._news.clear()
                await self._news.wait()


@pytest.fixture
def start():
    """Return a function that starts a process and returns the link to it and the process."""
    links = []

    def begin(code):
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            process = subprocess.Popen([sys.executable, "-c", code, str(number)], pass_fds=[number])
        links.append(WorkerLink(process, Connection(ours.detach())))
        return links[-1], process

    yield begin
    close_all(links, grace_s=0.1)


def test_messages_must_come_in_order_and_the_end_once(start):
    async def scenario():
        link, process = start(ECHO)
        listener = Listener(link)
        for name in "abc":
            link.send(Cancel(name))
        await listener.until(lambda it: len(it.heard) == 4)
        assert listener.heard == ["here", Cancel("a"), Cancel("b"), Cancel("c")]
        assert link.ending == ""
        link.send(Cancel("go"))
        await listener.until(lambda it: it.lost)
        link.send(Cancel("late"))
        assert (link.ending, process.poll()) == ("its process ended with exit status 0", 0)
        await asyncio.sleep(0.05)
        assert listener.lost == 1

    asyncio.run(scenario())


def test_a_killed_process_must_be_lost_and_tell_by_what(start):
    async def scenario():
        link, _ = start(DEAF)
        listener = Listener(link)
        await listener.until(lambda it: it.heard)
        link.kill()
        await listener.until(lambda it: it.lost)
        assert link.ending == "its process was ended by SIGKILL"

    asyncio.run(scenario())


def test_sending_to_a_process_that_does_not_read_must_not_wait(start):
    async def scenario():
        link, _ = start(DEAF)
        listener = Listener(link)
        await listener.until(lambda it: it.heard)
        began = time.monotonic()
        for _ in range(64):
            link.send(Cancel("x" * 100_000))
        assert time.monotonic() - began < 1
        link.kill()
        await listener.until(lambda it: it.lost)

    asyncio.run(scenario())


def test_workers_that_do_not_end_must_be_killed_within_one_grace_for_all(start):
    async def scenario():
        pairs = [start(DEAF) for _ in range(3)]
        listeners = [Listener(link) for link, _ in pairs]
        for listener in listeners:
            await listener.until(lambda it: it.heard)
        began = time.monotonic()
        close_all([link for link, _ in pairs], grace_s=0.3)
        assert time.monotonic() - began < 0.8
        assert [process.poll() for _, process in pairs] == [-9, -9, -9]

    asyncio.run(scenario())
