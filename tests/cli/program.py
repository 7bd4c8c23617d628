"""``filmstrip`` with a scripted model, to be run as a program.

FAKE_LLM in the environment has the model's fields as JSON, and ``repeat`` (how often it says its script), ``start_seconds``
(how long it loads) and ``load_error`` (why it cannot). Closing it prints ``closed`` to standard error, with the numbers of
requests that were left running and that were aborted.
"""

import asyncio
import json
import os
import sys
import types

from filmstrip.errors import ModelLoadError
from tests.server.fakes import FakeLLM


class ProgramLLM(FakeLLM):
    """Started and closed like the real one."""

    @classmethod
    async def start(cls, config):
        fields = json.loads(os.environ.get("FAKE_LLM", "{}"))
        repeat = fields.pop("repeat", 1)
        await asyncio.sleep(fields.pop("start_seconds", 0))
        if "load_error" in fields:
            raise ModelLoadError(fields["load_error"])
        llm = cls(**fields)
        llm.script = tuple(llm.script) * repeat
        return llm

    async def close(self):
        print(f"closed, running {len(self.running)}, aborted {len(self.aborted)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # In place of the real module, whose libraries take seconds to load.
    sys.modules["filmstrip.llm"] = types.ModuleType("filmstrip.llm")
    sys.modules["filmstrip.llm"].AsyncLLM = ProgramLLM  # type: ignore[attr-defined]
    from filmstrip.cli.main import main

    sys.exit(main())
