"""The engine process: ``python -m filmstrip.engine.process DESCRIPTOR``. Messages in, steps, outputs back; knows no media.

It is started as a program of its own, so a user's script needs no ``__main__`` guard, and it ends when its client does: the
end of the socket ends the process, whatever it is doing. The end of the parent process does, too: copies of it made by
``fork`` would keep the socket open.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import queue
import select
import signal
import socket
import threading
from collections.abc import Callable

from filmstrip import channel
from filmstrip.config import EngineConfig
from filmstrip.engine import messages
from filmstrip.engine.engine import Engine, StepOutput
from filmstrip.engine.sizing import decide_limits
from filmstrip.errors import EngineOverloadedError, FilmstripError
from filmstrip.models.base import Model
from filmstrip.models.loader import load_model
from filmstrip.shared_tensor import raise_open_files_limit

logger = logging.getLogger(__name__)

Incoming = queue.SimpleQueue[tuple[messages.ToEngine, list[int] | None]]
LoadModel = Callable[[EngineConfig], Model]

_PARENT_CHECK_SECONDS = 1.0


def main() -> None:
    """Serve one client over the socket whose descriptor is given."""
    parser = argparse.ArgumentParser(prog="python -m filmstrip.engine.process")
    parser.add_argument("descriptor", type=int)
    parser.add_argument("--model-factory", help="module:function that makes the model (used by tests)")
    arguments = parser.parse_args()
    # A Ctrl-C in the terminal is the client's to handle: it decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    raise_open_files_limit()
    load = load_model
    if arguments.model_factory:
        module, _, name = arguments.model_factory.partition(":")
        load = getattr(importlib.import_module(module), name)
    try:
        serve(socket.socket(fileno=arguments.descriptor), load)
    except ConnectionError:
        pass  # a client that goes away in the middle of an answer is an end like any other
    except Exception:
        logger.exception("the engine broke")
        os._exit(1)  # at once: a broken device can keep an orderly end from ever coming, and clients wait


def serve(connection: socket.socket, load: LoadModel) -> None:
    """Load the model the first message names and run until the client goes."""
    incoming: Incoming = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, incoming), daemon=True).start()
    start, _ = incoming.get()
    if not isinstance(start, messages.Start):
        raise ValueError(f"the first message is {type(start).__name__}, not Start")
    try:
        model = load(start.config)
        limits = decide_limits(start.config, model.info)
        engine = Engine(model, limits)
    except FilmstripError as error:
        _send(connection, messages.LoadFailed(error.message, error.param))
        return
    except Exception as error:
        logger.exception("the model could not be loaded")
        _send(connection, messages.LoadFailed(f"{start.config.model!r} could not be loaded: {error}", "model"))
        return
    # A model is hundreds of thousands of objects that live as long as the process: no collection need look at them.
    gc.collect()
    gc.freeze()
    info = model.info
    ready = messages.Ready(
        limits.max_model_len,
        limits.num_blocks,
        info.block_size,
        info.vocab_size,
        str(info.device),
        str(info.dtype).removeprefix("torch."),
    )
    _send(connection, ready)
    while True:
        _run_once(engine, connection, incoming)


def _run_once(engine: Engine, connection: socket.socket, incoming: Incoming) -> None:
    """Take what has arrived, waiting only if there is nothing else to do, then one step."""
    if not engine.has_work:
        _handle(engine, connection, *incoming.get())
    while not incoming.empty():
        _handle(engine, connection, *incoming.get())
    if engine.has_work:
        outputs = engine.step()
        if outputs:
            _send(connection, messages.Outputs([_token_output(output) for output in outputs]))


def _handle(
    engine: Engine, connection: socket.socket, message: messages.ToEngine, descriptors: list[int] | None
) -> None:
    if isinstance(message, messages.AddRequest):
        try:
            _add(engine, message, descriptors)
        except FilmstripError as error:
            _refuse(connection, message.request_id, error)
        except Exception:
            logger.exception("a request could not be read")
            _refuse(connection, message.request_id, FilmstripError("the engine could not read the request"))
    elif isinstance(message, messages.Abort):
        engine.abort(message.request_id)
    elif isinstance(message, messages.GetStats):
        _send(connection, messages.Stats(message.number, engine.stats()))
    else:
        raise ValueError(f"unexpected message {type(message).__name__}")


def _add(engine: Engine, message: messages.AddRequest, descriptors: list[int] | None) -> None:
    if descriptors is None:
        raise EngineOverloadedError(
            "the engine has too many media items open at once; send fewer, or raise the limit on open files (ulimit -n)"
        )
    prompt = messages.processed_prompt(message, descriptors)
    engine.add_request(message.request_id, prompt, message.params, message.stop_token_ids)


def _refuse(connection: socket.socket, request_id: str, error: FilmstripError) -> None:
    output = messages.TokenOutput(request_id, [], "abort", None, 0, (error.code, error.message, error.param))
    _send(connection, messages.Outputs([output]))


def _token_output(output: StepOutput) -> messages.TokenOutput:
    error = None if output.error is None else ("internal_error", output.error, None)
    return messages.TokenOutput(
        output.request_id,
        output.new_token_ids,
        output.finish_reason,
        output.stop_reason,
        output.num_cached_tokens,
        error,
    )


def _read(connection: socket.socket, incoming: Incoming) -> None:
    """Read frames until the client goes; then the process has no reason to live, even in the middle of a step."""
    reader, parent = channel.FrameReader(connection), os.getppid()
    try:
        while _wait_for_data(connection, parent) and (frame := reader.read()) is not None:
            payload, descriptors = frame
            incoming.put((messages.decode_to_engine(payload), descriptors))
    except ConnectionError:
        pass
    except BaseException:
        logger.exception("the engine's connection broke")
        os._exit(1)
    os._exit(0)


def _wait_for_data(connection: socket.socket, parent: int) -> bool:
    """Wait until there is something to read; False if the parent process has ended meanwhile."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    while not poll.poll(_PARENT_CHECK_SECONDS * 1000):
        if os.getppid() != parent:
            return False
    return True


def _send(connection: socket.socket, message: messages.ToClient) -> None:
    connection.sendall(b"".join(data for data, _ in messages.frame_parts(message, [])))


if __name__ == "__main__":
    main()
