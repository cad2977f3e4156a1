"""The question that is put to an instance from inside it, and the answer that comes back; see zops/serving/ask.py."""

import json
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from zops.errors import RuntimeUnreachable, ZopsError

Value = TypeVar("Value")

# The program by which a question is put, beside the interpreter that runs it.
ASK_MODULE = "zops.serving.ask"
# What starting an interpreter, and the way to it, may take beyond the time for the answer.
WAY_S = 5.0
# As much as zops/health/client.py takes by another way.
MAX_ANSWER_BYTES = 512 << 20
_TOO_LATE = 3


def question_environment(
    method: str, path: str, body: bytes | None, *, timeout_s: float, key: str = ""
) -> dict[str, str]:
    """Return the environment in which the program finds its question."""
    question = json.dumps({"method": method, "path": path, "timeout_s": timeout_s})
    return (
        {"ZOPS_ASK": question}
        | ({} if body is None else {"ZOPS_ASK_BODY": body.decode()})
        | ({"ZOPS_API_KEY": key} if key else {})
    )


def read_answer(name: str, exit_code: int | None, said: bytes, complaint: bytes) -> tuple[int, bytes]:
    """Return status and body of an answer.

    Args:
        name: of the deployment.
        exit_code: of the program, None where it is not known.
        said: its standard output.
        complaint: its standard error.

    Raises:
        RuntimeUnreachable: when there is none.
    """
    head, _, body = said.partition(b"\n")
    if exit_code == 0 and head.isdigit():
        return int(head), body
    if exit_code == _TOO_LATE:
        raise too_late(name)
    lines = (complaint or said).decode("utf-8", "replace").strip().splitlines()
    why = lines[-1][:200] if lines else f"the program that asks ended with status {exit_code}"
    raise RuntimeUnreachable(
        f"nothing answers inside {name}: {why}",
        code="instance-unreachable",
        hint=f"see what it does with: zops logs --name {name}",
    )


def too_late(name: str) -> RuntimeUnreachable:
    """Return the error of an instance that did not answer in time."""
    return RuntimeUnreachable(
        f"{name}, asked from inside, did not answer in time",
        code="instance-timeout",
        hint=f"see what it does with: zops logs --name {name}",
    )


def ask_inside(
    engine: Any, container: str, name: str, environment: dict[str, str], *, timeout_s: float
) -> tuple[int, bytes]:
    """Put a question from inside a container; return status and body of the answer.

    Args:
        engine: of the container, as docker-py's `APIClient`.
        container: its id.
        name: of the deployment.
        environment: holds the question.
        timeout_s: longest time for the answer.

    Raises:
        RuntimeUnreachable: when the server does not answer, or the engine does not in time.
        ZopsError: `instance-stranger` when the answer has no end.
        Exception: whatever the engine's client raises.
    """

    def ask() -> tuple[int | None, bytes, bytes]:
        made = engine.exec_create(container, ["python", "-m", ASK_MODULE], environment=environment)
        said, complaint = bytearray(), bytearray()
        stream = engine.exec_start(made["Id"], stream=True, demux=True)
        try:
            for out, error in stream:
                said += out or b""
                complaint += error or b""
                if len(said) + len(complaint) > MAX_ANSWER_BYTES:
                    size = f"its answer is larger than {MAX_ANSWER_BYTES >> 20} MiB"
                    raise ZopsError(f"what answers inside {name} is not zops: {size}", code="instance-stranger")
        finally:
            # docker-py leaves that to its caller, and its own way leaves the descriptor to the garbage collector.
            stream._response.close()  # noqa: SLF001 - nothing public reaches it
        return engine.exec_inspect(made["Id"])["ExitCode"], bytes(said), bytes(complaint)

    answer = _within(timeout_s + WAY_S, ask)
    if answer is None:
        raise too_late(name)
    return read_answer(name, *answer)


def _within(seconds: float, call: Callable[[], Value]) -> Value | None:
    """Return what a call returns, None when it takes longer: then it is left alone in its thread.

    A container that is frozen in the middle of a question keeps its connection to the engine open for ever.
    """
    ended: queue.SimpleQueue[tuple[Value | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((call(), None))
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            ended.put((None, error))

    threading.Thread(target=run, name="ask", daemon=True).start()
    try:
        value, error = ended.get(timeout=seconds)
    except queue.Empty:
        return None
    if error is not None:
        raise error
    return value
