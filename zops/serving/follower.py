"""A follower: the process of one more card of a worker. It has the transformer only, and does what its worker does."""

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zops.errors import ZopsError
from zops.serving.followers import Loaded, Memory, NotLoaded, meet, stay_on_this_host
from zops.serving.messages import BEAT_S, Post

if TYPE_CHECKING:
    from zops.serving.accelerate.denoise import Denoiser

_PR_SET_PDEATHSIG = 1


def main(connection: "Connection[Any, Any]", post: Post) -> None:
    """Load, meet the other cards, and take part in each call until the worker is gone."""
    _die_with(post.leader)
    stay_on_this_host()
    try:
        denoiser, device = _load(post)
    except Exception as error:  # noqa: BLE001 - whatever it is, the worker must be able to tell it
        if not isinstance(error, ZopsError):
            traceback.print_exc()
        connection.send(NotLoaded(str(error) or type(error).__name__))
        sys.exit(1)
    connection.send(Loaded())
    denoiser.cards = meet(post.meeting, post.rank, post.settings.cards, device)
    threading.Thread(target=_tell_memory, args=(connection, device), name="memory", daemon=True).start()
    try:
        _follow(connection, denoiser)
    except EOFError:
        os._exit(0)  # the worker is gone; what torch.distributed would do at an orderly end waits for the others
    except BaseException:  # noqa: BLE001 - the worker sees the end, this log the cause
        traceback.print_exc()
        os._exit(1)


def _die_with(leader: int) -> None:
    """Have the kernel kill this process with the worker, also when a collective would never return to Python."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != leader:
        os._exit(0)  # it was gone already


def _load(post: Post) -> "tuple[Denoiser, str]":
    """Return the denoiser of this card, not yet together with the others, and the card."""
    from zops.cache.manifest import require_verified  # noqa: PLC0415 - spares time before the first signal
    from zops.serving.assemble import give_weights, load_rest, make_empty, weight_files  # noqa: PLC0415 - as above
    from zops.serving.target import find_target, prepare_environment  # noqa: PLC0415 - as above
    from zops.serving.volume import open_volume  # noqa: PLC0415 - as above

    settings, snapshot = post.settings, Path(post.settings.snapshot)
    prepare_environment(settings, open_volume(settings.kernels, settings.gpus))
    manifest = require_verified(snapshot)
    import torch  # noqa: PLC0415 - only now

    from zops.serving.accelerate.denoise import Denoiser  # noqa: PLC0415 - as above
    from zops.serving.accelerate.fp8 import quantise_on_arrival  # noqa: PLC0415 - as above
    from zops.serving.accelerate.fused import fuse_blocks  # noqa: PLC0415 - as above
    from zops.serving.accelerate.preset import choose_attention  # noqa: PLC0415 - as above
    from zops.serving.accelerate.rows import operations  # noqa: PLC0415 - as above
    from zops.serving.memory import give_back  # noqa: PLC0415 - as above
    from zops.serving.streaming import WeightStream  # noqa: PLC0415 - as above

    target = find_target(settings, first=post.rank)
    card = target.cards[0]
    device = torch.device(card)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    fp8 = post.preset == "fp8"
    paths = weight_files(snapshot)["transformer"]
    stream = WeightStream(
        snapshot,
        paths,
        card,
        target.dtype,
        verify=manifest if settings.verify_on_load else None,
        arrived=quantise_on_arrival(text=False) if fp8 else None,
    )
    transformer = make_empty(snapshot, "transformer")
    scheduler = load_rest(snapshot, tuple(weight_files(snapshot)))["scheduler"]
    give_weights(transformer, "transformer", stream.result().take("transformer"), card)
    fuse_blocks(transformer, operations(device), fp8=fp8)
    if device.type == "cuda":
        choose_attention(transformer, device, heads=-(-transformer.n_heads // settings.cards))
    give_back(card)
    return Denoiser(transformer, scheduler), card


def _follow(connection: "Connection[Any, Any]", denoiser: "Denoiser") -> None:
    from zops.serving.accelerate.lead import take_part  # noqa: PLC0415 - imported already, all but this

    while True:
        take_part(denoiser, connection.recv(), connection.recv)


def _tell_memory(connection: "Connection[Any, Any]", card: str) -> None:
    from zops.serving.memory import gauge  # noqa: PLC0415 - as above

    look = gauge([card])
    while told := look():
        connection.send(Memory(*told[0]))
        time.sleep(BEAT_S)
