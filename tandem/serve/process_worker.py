"""The main program of a worker process: `python -m tandem.serve.process_worker FD`; see `process_host`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

from tandem.serve.frames import packed, received
from tandem.serve.hosts import describe
from tandem.serve.inbox import Inbox, run_worker
from tandem.serve.messages import Command
from tandem.serve.worker import Worker
from tandem.spec.errors import SpecError

LAST_STEP_S = 30.0
"""A worker whose server is gone may finish its step within this time, and then ends whatever it does."""


def main(fd: int) -> None:
    """Build the worker that comes as the first message, then serve until told to stop or until the server is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they go to the whole group: the server decides, and drains first
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=fd)
    channel.set_inheritable(False)
    messages = received(channel)
    build = cast("Callable[[], Worker] | None", next(messages, None))
    if build is None:  # the server was gone before it said what to build
        return
    inbox = Inbox()
    threading.Thread(target=_read, args=(messages, inbox), daemon=True).start()
    worker: Worker | None = None
    try:
        worker = build()
        channel.sendall(packed(replace(worker.capacity, pid=os.getpid())))
        run_worker(worker, inbox, lambda batch: channel.sendall(packed(batch)))
    except ConnectionError:
        pass
    except Exception as wrong:
        if not isinstance(wrong, SpecError):  # which says all in its one line
            traceback.print_exc(file=sys.stderr)
        channel.sendall(packed(describe(wrong)))
    finally:
        if worker is not None:
            worker.close()


def _read(messages: Iterator[object], inbox: Inbox) -> None:
    for message in messages:
        inbox.put(cast("Command", message))
    inbox.close()
    time.sleep(LAST_STEP_S)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
