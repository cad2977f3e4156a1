"""What of the specification the scheduler has to know."""

from typing import Protocol


class Bounds(Protocol):
    """The operator's limits that concern the queue and the workers."""

    @property
    def max_queue(self) -> int:
        """Requests that may wait."""
        ...

    @property
    def request_timeout_s(self) -> float:
        """Longest that one request may take."""
        ...

    @property
    def startup_timeout_s(self) -> float:
        """Longest that a worker may take until it is ready."""
        ...
