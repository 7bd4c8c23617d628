"""What can go wrong, as one tree; knows HTTP statuses by number and nothing else of HTTP.

::

    FilmstripError                     500  internal_error
    ├── InvalidRequestError            400  invalid_value         a field of the request is wrong
    │   ├── MediaError                 400  invalid_media         a media item cannot be used
    │   │   ├── MediaFetchError        400  media_fetch_failed    it could not be downloaded or read
    │   │   │   └── MediaBlockedError  400  media_blocked         its address or path is not allowed
    │   │   ├── MediaTooLargeError     400  media_too_large       it is over a byte, pixel or frame limit
    │   │   └── MediaDecodeError       400  media_decode_failed   its bytes are not a picture or a video
    │   └── ContextLengthError         400  context_length_exceeded
    ├── ModelNotFoundError             404  model_not_found       no such model here
    ├── ModelLoadError                 500  model_load_failed     a checkpoint cannot be served
    ├── EngineDeadError                500  engine_dead           the engine process ended
    └── EngineOverloadedError          503  overloaded            no room for the request now

Each message names the limit, the value and the option to change; it never carries an address the caller did not send, a
path of the server, or a traceback.
"""

from __future__ import annotations


class FilmstripError(Exception):
    """Base of every error Filmstrip raises on purpose.

    ``message`` is for people, ``param`` names the request field (dotted path) or is None, ``code`` is stable for programs
    and ``http_status`` is what the server answers with.
    """

    http_status: int = 500
    error_type: str = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequestError(FilmstripError, ValueError):
    """A field of the request is wrong."""

    http_status = 400
    error_type = "invalid_request_error"
    code = "invalid_value"


class MediaError(InvalidRequestError):
    """A media item of the request cannot be used."""

    code = "invalid_media"


class MediaFetchError(MediaError):
    """A media item could not be downloaded or read."""

    code = "media_fetch_failed"


class MediaBlockedError(MediaFetchError):
    """The address, scheme or path of a media item is not allowed."""

    code = "media_blocked"


class MediaTooLargeError(MediaError):
    """A media item is over a byte, pixel, frame or time limit."""

    code = "media_too_large"


class MediaDecodeError(MediaError):
    """The bytes of a media item are not what they were said to be."""

    code = "media_decode_failed"


class ContextLengthError(InvalidRequestError):
    """Prompt and requested completion do not fit the model's context."""

    code = "context_length_exceeded"


class ModelNotFoundError(FilmstripError):
    """The request names a model that is not served here."""

    http_status = 404
    error_type = "invalid_request_error"
    code = "model_not_found"


class ModelLoadError(FilmstripError):
    """A checkpoint cannot be loaded or is of an unsupported architecture."""

    code = "model_load_failed"


class EngineDeadError(FilmstripError):
    """The engine process ended; its requests cannot be answered."""

    code = "engine_dead"


class EngineOverloadedError(FilmstripError):
    """There is no room for the request now; it may be sent again later."""

    http_status = 503
    code = "overloaded"
