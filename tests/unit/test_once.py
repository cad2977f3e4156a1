"""A property that is worked out once must be so for each object alone."""

import threading

from zops.once import once


class Slow:
    def __init__(self, gate: threading.Event) -> None:
        self.gate = gate
        self.count = 0

    @once
    def value(self) -> int:
        """What takes its time."""
        self.count += 1
        assert self.gate.wait(10)
        return self.count


def test_a_value_must_be_worked_out_once_and_only_when_it_is_wanted() -> None:
    opened = threading.Event()
    opened.set()
    one = Slow(opened)
    assert one.count == 0
    assert [one.value, one.value, one.count] == [1, 1, 1]
    assert Slow.value.__doc__ == "What takes its time."


def test_an_object_that_takes_long_must_not_keep_another_waiting() -> None:
    shut, opened = threading.Event(), threading.Event()
    opened.set()
    waiting = Slow(shut)
    thread = threading.Thread(target=lambda: waiting.value)
    thread.start()
    try:
        assert Slow(opened).value == 1
        assert thread.is_alive()
    finally:
        shut.set()
        thread.join()
