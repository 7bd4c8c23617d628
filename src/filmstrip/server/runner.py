"""An application to a running HTTP server: the socket, uvicorn, and an orderly end; knows no route."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket

import uvicorn
from fastapi import FastAPI

from filmstrip.config import ServerConfig
from filmstrip.server.middleware import is_loopback

logger = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 5.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(config: ServerConfig) -> socket.socket:
    """Take the address, without listening yet. Raises OSError: better before the model is loaded than after."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where the protocol is named; with it, small answers wait 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host.strip("[]"), config.port))
    except BaseException:
        listener.close()
        raise
    return listener


async def run(app: FastAPI, config: ServerConfig, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM.

    Then no new connection is accepted and running requests have ``drain_timeout_seconds`` to finish; a second signal ends
    them at once.
    """
    server = Server(app, config)
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, server.stop)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not is_loopback(host) and config.api_key is None:
        logger.warning("everybody who reaches %s:%d may use this server; --api-key asks for a key", shown, port)
    logger.info("listening on http://%s:%d/v1", shown, port)
    try:
        await server.serve(sockets=[listener])
    finally:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)


class Server(uvicorn.Server):
    """uvicorn's server, stopped by :meth:`stop` instead of by handlers of its own that end the process by signal."""

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # bounds the size of headers, which httptools does not
                ws="none",
                lifespan="off",
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(config.drain_timeout_seconds)),
            )
        )

    def stop(self) -> None:
        """Finish what runs; the second time, end it."""
        if self.should_exit:
            self.force_exit = True
            # From Python 3.12 on, a closed listener waits for its connections, whatever uvicorn does not wait for.
            for task in self.server_state.tasks:
                task.cancel()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests finish, cancel those that take too long, and let these tell their clients."""
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_WORDS_SECONDS)

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Nothing: the signals are ours."""
        return contextlib.nullcontext()
