"""``filmstrip``: arguments to a command, its outcome to an exit code; knows what commands there are, not what they do."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from filmstrip.cli.arguments import parse_arguments
from filmstrip.cli.options import UsageError
from filmstrip.errors import FilmstripError

_COMMANDS = {
    "serve": "filmstrip.cli.serve",
    "chat": "filmstrip.cli.chat",
    "inspect": "filmstrip.cli.inspect",
    "models": "filmstrip.cli.models",
    "demo": "filmstrip.cli.demo",
}
"""Loaded on demand: a model's libraries take seconds to load, ``--help`` must not."""

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # names and questions may have what the terminal's encoding has not
            stream.reconfigure(errors=errors)
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        return import_module(_COMMANDS[arguments.command]).run(arguments)
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE)
    except FilmstripError as error:
        return _fail(error.message, EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough; Python must not try to flush the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _fail(message: str, exit_code: int) -> int:
    print(f"filmstrip: error: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
