"""What all routes share: the model, the settings and the model's public name; knows no request."""

from __future__ import annotations

import importlib.metadata
import os
import time
from typing import TYPE_CHECKING

from starlette.requests import Request

from filmstrip.config import ServerConfig
from filmstrip.errors import ModelNotFoundError

if TYPE_CHECKING:
    from filmstrip.llm import AsyncLLM

VERSION = importlib.metadata.version("filmstrip")
SYSTEM_FINGERPRINT = f"filmstrip-{VERSION}"


class ServerState:
    """The one model a server answers with."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        self.created = int(time.time())
        self.model_name = config.served_model_name or _public_name(llm.model_name)

    def check_model(self, name: str | None) -> str:
        """The model's public name. Raises ModelNotFoundError if the request names another; naming none is fine.

        Unless the server was given a name, clients may also use the one it was started with, a directory for example.
        """
        also = None if self.config.served_model_name else self.llm.model_name
        if name and name not in (self.model_name, also):
            raise ModelNotFoundError(
                f"there is no model {name[:200]!r} here; this server has {self.model_name!r} (--served-model-name)",
                param="model",
            )
        return self.model_name


def server_state(request: Request) -> ServerState:
    """The state of the application that ``request`` came to."""
    return request.app.state.server


def _public_name(model: str) -> str:
    """A hub id as it is; of a directory only the last part: where it lies is nobody's business."""
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model
