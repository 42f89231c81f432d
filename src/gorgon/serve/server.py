"""Runs the server: loads, listens, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from gorgon.core.tree import DraftTree
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.engine import PLAIN, Engine
from gorgon.decode.load import load_engine
from gorgon.errors import GorgonError, ModelError
from gorgon.models.backbone import load_backbone
from gorgon.progress import say
from gorgon.serve.app import make_app, model_name
from gorgon.serve.gate import log, start_log
from gorgon.serve.metrics import Meter
from gorgon.serve.scheduler import Scheduler
from gorgon.serve.settings import ServeConfig

NGRAM_LENGTH = 6
"""Tokens that are copied from the context when there are no heads; longer chains rarely hold (docs/lab-notes.md)."""
SWITCH_S = 0.0005
"""How long a thread may keep the interpreter: the engine's thread should not wait 5 ms, Python's default, after every
product for the event loop to finish a chunk of text."""
LAST_WORDS_S = 2
"""After the drain, until connections are cut whose clients do not read their answer's end. SageMaker kills the process
30 seconds after SIGTERM: `drain_s`, this, and what `Scheduler.stop` waits must stay below."""
MOST_HEADER_BYTES = 65_536
BACKLOG = 2048


def load(config: ServeConfig) -> Engine:
    """The engine that the settings ask for.

    Raises: what `load_engine` raises; ModelError with a hint when a model without heads is to be served with them.
    """
    if config.drafts == "tuned":
        if not (Path(config.model) / "tree.json").is_file():
            raise ModelError(
                "the model has no tuned heads", field="model", value=config.model,
                hint="give a directory that `gorgon tune` wrote, or serve without heads: --drafts ngram, --drafts none",
            )  # fmt: skip
        return load_engine(config.model, dtype=config.dtype, quantization=config.quantization, steps=config.steps)
    backbone = load_backbone(config.model, dtype=config.dtype, quantization=config.quantization)
    backbone.run_steps(config.steps)
    return Engine(
        backbone, None, StaticDrafter(DraftTree.of([], ngram=NGRAM_LENGTH)) if config.drafts == "ngram" else PLAIN
    )


def http_config(app: FastAPI, config: ServeConfig) -> uvicorn.Config:
    """How HTTP is spoken: bounded headers, a bounded drain, and our own log."""
    return uvicorn.Config(
        app, http="h11", ws="none", log_config=None, access_log=False, server_header=False, backlog=BACKLOG,
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        timeout_graceful_shutdown=math.ceil(config.drain_s) + LAST_WORDS_S,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """uvicorn, but the scheduler hears of a stop at once, so that open connections get no new work."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self._scheduler = scheduler

    def handle_exit(self, sig: int, frame: object) -> None:
        """The first signal drains, the second ends at once."""
        self._scheduler.drain()
        log.info("draining", extra={"fields": {"signal": signal.Signals(sig).name}})
        super().handle_exit(sig, frame)  # type: ignore[arg-type]


def serve(config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish.

    Raises: GorgonError when the port is taken or the model cannot be loaded.
    """
    sys.setswitchinterval(SWITCH_S)
    start_log()
    meter = Meter()
    scheduler = Scheduler(lambda: load(config), config, meter)
    listener = _listen(config)
    host, port = listener.getsockname()[:2]

    def end() -> None:
        server.should_exit = True

    app = make_app(config, scheduler, meter, end)
    server = _Server(http_config(app, config), scheduler)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(_run(server, listener, scheduler, f"http://{host}:{port}", model_name(config)))
    finally:
        listener.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if scheduler.failure is not None:
        raise _told(scheduler.failure, config.model)
    if scheduler.alive:  # it loads, compiles or hangs: the interpreter cannot end around it without a crash
        sys.stderr.flush()
        os._exit(0)


async def _run(server: uvicorn.Server, listener: socket.socket, scheduler: Scheduler, address: str, name: str) -> None:
    watcher = asyncio.ensure_future(_announce(scheduler, address, name))
    try:
        await server.serve([listener])
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


async def _announce(scheduler: Scheduler, address: str, name: str) -> None:
    """Says what the server does until it is ready, and what it reserved."""
    start = time.monotonic()
    say(f"loading {name}; {address}/ping answers 503 until it is served")
    while scheduler.state == "loading" and not scheduler.warming:
        await asyncio.sleep(0.05)
    if scheduler.warming and scheduler.engine is not None:
        how = scheduler.engine.backbone.steps
        say(f"warming up, {how} steps" + ("; compiling them can take minutes" if how == "compiled" else ""))
    while scheduler.state == "loading":
        await asyncio.sleep(0.05)
    if scheduler.state == "ready":
        say(str(scheduler.plan))
        say(f"serving {name} at {address}")
        fields = {"model": name, "address": address, "seconds": round(time.monotonic() - start, 1)}
        log.info("ready", extra={"fields": fields})


def _listen(config: ServeConfig) -> socket.socket:
    """The listening socket, made before the model is loaded, so that probes get an answer at once.

    Raises: GorgonError when the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
        # Connections inherit it. asyncio sets it only where a socket's protocol number is given; here it is not, and
        # without it the pieces of a stream wait 40 ms for the client's acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
        raise GorgonError(
            f"cannot listen: {reason}", field="port", value=f"{config.host}:{config.port}",
            hint="is another server running there? choose another --port",
        ) from error  # fmt: skip


def _told(failure: Exception, model: str) -> GorgonError:
    if isinstance(failure, GorgonError):
        return failure
    logging.getLogger("gorgon.serve").error("the model could not be loaded", exc_info=failure)
    return ModelError(f"the model could not be loaded: {type(failure).__name__}: {failure}", field="model", value=model)
