"""An event loop whose time passes only when it has nothing to do, and then at once."""

import asyncio
import selectors

# A scenario that gets here waits for something that never comes.
END_OF_TIME_S = 100_000


class _Selector(selectors.DefaultSelector):
    """Reports what is there, and moves the clock instead of waiting for more."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        found = super().select(0)
        if not found:
            assert timeout is not None, "everybody waits, and nothing will happen any more"
            self.now += max(0.0, timeout)
            assert self.now < END_OF_TIME_S, "the scenario never ends"
        return found


class PatientLoop(asyncio.SelectorEventLoop):
    """A loop with a clock of its own, for tests of timeouts that take no time. It must not be used with threads."""

    def __init__(self):
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self):
        return self._virtual.now

    def hold_up(self, seconds):
        """Let time pass in which the loop does nothing, as when its process is stopped."""
        self._virtual.now += seconds


def run_patiently(coroutine):
    """Run a coroutine in virtual time."""
    with asyncio.Runner(loop_factory=PatientLoop) as runner:
        return runner.run(coroutine)
