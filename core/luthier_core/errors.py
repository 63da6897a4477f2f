"""The exception tree. A class is a sentence for the user, an HTTP status and an error category.

    LuthierError
    ├── BadRequest            400 user     ├── Unauthorized   401 user
    │   ├── InvalidField                   ├── NotFound       404 user
    │   └── Unsupported                    ├── BodyTooLarge   413 user
    ├── Forbidden             403 user     ├── Unreadable     422 user
    ├── OutOfScope            403 user     ├── Unavailable    503 server
    ├── Gone                  410 server   │
    └── TooManyRequests       429 server   └── CheckpointDamaged  500 server

A 409 does not exist here: the official SDK retries it for minutes (wire protocol 1.6).
"""

from typing import Literal

Category = Literal["user", "server", "unknown"]


class LuthierError(Exception):
    """Something the caller can be told about."""

    status: int = 500
    category: Category = "server"
    retry_after_s: int | None = None

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail)
        self.detail = detail

    @property
    def message(self) -> str:
        """The class's sentence, then the detail that names the value.

        An error of no particular class has its detail only.
        """
        if type(self) is LuthierError:
            return self.detail
        sentence = (type(self).__doc__ or "").split("\n")[0].strip()
        return f"{sentence.rstrip('.')}: {self.detail}" if self.detail else sentence

    def __str__(self) -> str:
        return self.message


class CheckpointDamaged(LuthierError):
    """A stored checkpoint cannot be read as it was written."""


class BadRequest(LuthierError):
    """The request cannot be carried out."""

    status, category = 400, "user"


class InvalidField(BadRequest):
    """A field has a value that is not allowed."""


class Unsupported(BadRequest):
    """This server does not support that."""


class Unauthorized(LuthierError):
    """The API key in X-API-Key is missing or not valid."""

    status, category = 401, "user"


class Forbidden(LuthierError):
    """This download link is not valid, or its time has passed."""

    status, category = 403, "user"


class OutOfScope(LuthierError):
    """This API key may not do that."""

    status, category = 403, "user"


class NotFound(LuthierError):
    """There is no such thing, or it is not yours."""

    status, category = 404, "user"


class Gone(LuthierError):
    """The result is no longer kept."""

    status, category = 410, "server"


class BodyTooLarge(LuthierError):
    """The request body is larger than this server accepts."""

    status, category = 413, "user"


class Unreadable(LuthierError):
    """The request body cannot be read."""

    status, category = 422, "user"


class TooManyRequests(LuthierError):
    """The server is at its limit; the request was not accepted and can be sent again."""

    status, category = 429, "server"
    retry_after_s = 5


class Unavailable(LuthierError):
    """A part of the service is not reachable just now; the request can be sent again."""

    status, category = 503, "server"
    retry_after_s = 20


class ConfigError(Exception):
    """The configuration or the machine does not allow a start; one line for the operator."""
