"""Everything that this package raises for what a user, a server or the network can cause.

LuthierError
├── APIError                    a request got no good answer
│   ├── APIStatusError          an answer that says no; one class per status
│   ├── APIConnectionError      no answer, for longer than it was tried
│   │   └── APITimeoutError
│   └── APIResponseValidationError
├── RequestFailedError          a request was accepted, and failed when it was executed
└── ClosedError                 the client has been closed
"""

from enum import StrEnum


class RequestErrorCategory(StrEnum):
    """Whose fault a failure is."""

    User = "user"
    Server = "server"
    Unknown = "unknown"


class LuthierError(Exception):
    """Base of all errors of this package."""


TinkerError = LuthierError
"""The name that programs for the Tinker API know it by."""


class APIError(LuthierError):
    """A request got no good answer. message: the server's sentence; body: its JSON, if any."""

    def __init__(self, message: str, *, body: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.body = body


class APIStatusError(APIError):
    """The server refused a request. status_code: the HTTP status."""

    def __init__(self, message: str, status_code: int, body: object = None) -> None:
        super().__init__(message, body=body)
        self.status_code = status_code

    def __reduce__(self) -> tuple[type["APIStatusError"], tuple[object, ...]]:
        return type(self), (self.message, self.status_code, self.body)


class BadRequestError(APIStatusError):
    """400: something in the request is wrong; the message names it."""


class AuthenticationError(APIStatusError):
    """401: the API key is missing or unknown."""


class BillingError(APIStatusError):
    """402: the account cannot pay."""


class PermissionDeniedError(APIStatusError):
    """403: this is somebody else's."""


class NotFoundError(APIStatusError):
    """404: there is no such thing, or it is somebody else's."""


class ConflictError(APIStatusError):
    """409: it is in a state that does not allow this."""


class GoneError(APIStatusError):
    """410: it has ended or expired."""


class UnprocessableEntityError(APIStatusError):
    """422: the request makes no sense as a whole."""


class RateLimitError(APIStatusError):
    """429 for longer than it was tried."""


class InternalServerError(APIStatusError):
    """5xx for longer than it was tried."""


class APIConnectionError(APIError):
    """The server could not be reached for longer than it was tried."""

    def __init__(self, message: str = "Connection error.") -> None:
        super().__init__(message)


class APITimeoutError(APIConnectionError):
    """The server did not answer in time for longer than it was tried."""


class APIResponseValidationError(APIError):
    """The server's answer is not what the protocol says."""


class ClosedError(LuthierError):
    """This client has been closed: its session has ended."""


class RequestFailedError(LuthierError):
    """A request was accepted, and failed when it was executed.

    message: the server's reason; request_id: for the server's logs; category: whose fault it is.
    """

    def __init__(self, message: str, request_id: str, category: RequestErrorCategory | str) -> None:
        known = category in set(RequestErrorCategory)
        self.message = message
        self.request_id = request_id
        self.category = RequestErrorCategory(category if known else "unknown")
        super().__init__(f"{message} (category {self.category.value}, request {request_id})")

    def __reduce__(self) -> tuple[type["RequestFailedError"], tuple[str, str, str]]:
        return type(self), (self.message, self.request_id, self.category.value)


_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    402: BillingError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    410: GoneError,
    422: UnprocessableEntityError,
    429: RateLimitError,
}


def status_error(status: int, message: str, body: object = None) -> APIStatusError:
    """The error of an HTTP status."""
    default = InternalServerError if status >= 500 else APIStatusError
    return _BY_STATUS.get(status, default)(message, status, body)
