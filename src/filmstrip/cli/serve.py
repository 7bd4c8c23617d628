"""``filmstrip serve``: settings to a running server; loads the model, answers nothing itself."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import time

from filmstrip.cli.arguments import server_config
from filmstrip.cli.options import UsageError
from filmstrip.config import ServerConfig
from filmstrip.llm import AsyncLLM
from filmstrip.server.app import create_app
from filmstrip.server.runner import bind
from filmstrip.server.runner import run as run_server
from filmstrip.shared_tensor import raise_open_files_limit

logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; returns 0. Raises UsageError if the address cannot be had, ModelLoadError."""
    config = server_config(arguments)
    _configure_logging(config.log_level)
    raise_open_files_limit()
    try:
        listener = bind(config)
    except OSError as error:
        raise UsageError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from None
    with listener:
        asyncio.run(_serve(config, listener))
    return 0


async def _serve(config: ServerConfig, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    loading = asyncio.ensure_future(_load(config))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, loading.cancel)
    try:
        llm = await loading
    except asyncio.CancelledError:
        return
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    try:
        await run_server(create_app(llm, config), config, listener)
    finally:
        await llm.close()


async def _load(config: ServerConfig) -> AsyncLLM:
    started = time.monotonic()
    logger.info("loading %s", config.llm.engine.model)
    llm = await AsyncLLM.start(config.llm)
    logger.info("loaded in %.1f s; up to %d tokens of prompt and answer", time.monotonic() - started, llm.max_model_len)
    return llm


def _configure_logging(level: str) -> None:
    """Ours and uvicorn's lines on standard error; of other libraries only warnings."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for name in ("filmstrip", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
