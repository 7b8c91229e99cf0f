"""Being asked to stop: SIGTERM or Ctrl-C ends the step and saves, a second one ends the program."""
from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import Iterator

import torch
from tqdm import tqdm

import parallel

# Signals of this process so far, the first in front.
received: list[int] = []

# torchrun hands on to its workers what they may have got from the terminal already: signals so
# close together, in seconds, are one.
ONE_SIGNAL = 1.0


class Stopped(Exception):
    """The run was asked to stop, and what it had done is saved; the text says how far it came."""


@contextmanager
def listening(is_main: bool) -> Iterator[None]:
    """Take note of SIGTERM and SIGINT in place of dying of them."""
    received.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # a person's own program calls this: its signals are its own
        return
    # Python runs handlers between two of its instructions, and the main thread may wait in a
    # collective for ever. So the signals go through a pipe to a thread that always listens.
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    listener = threading.Thread(target=listen, args=(reads, is_main), daemon=True)
    listener.start()
    former = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and & have it
            former[number] = signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in former.items():
            signal.signal(number, handler)
        os.close(writes)
        listener.join()
        os.close(reads)


def listen(pipe: int, is_main: bool) -> None:
    """Note the first signal, say so, and end the program at the second."""
    began = 0.0
    while number := int.from_bytes(os.read(pipe, 1), "little"):
        if not received:
            began = time.monotonic()
            received.append(number)
            if is_main:
                tqdm.write("asked to stop: the step is finished and saved first; once more to "
                           "stop at once", file=sys.stderr)
        elif time.monotonic() - began > ONE_SIGNAL:
            parallel.leave(128 + number)


def asked() -> bool:
    """Return, on all ranks alike, whether any of them was asked to stop."""
    return bool(parallel.all_max(torch.tensor(float(bool(received)))))


def stop_if_asked(where: str) -> None:
    """End the run here, on all ranks, if it was asked to stop and all it did is saved."""
    if asked():
        raise Stopped(where)
