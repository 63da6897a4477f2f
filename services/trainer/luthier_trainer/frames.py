"""What passes between the worker and its engine child: JSON and bytes in frames on a socketpair.

A message is a JSON object with some byte strings. It travels in frames of at most PIECE_BYTES of
them, so that a large one (a snapshot) holds up no other for long:

    header length u32 | body length u32, big-endian | header JSON | body

Every header has the message's `id`, and `last` if no frame of it follows; the first one also has
`fields` and the `sizes` of the byte strings. Nothing is ever unpickled (reliability S6).
"""

import json
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier_core import errors

PIECE_BYTES = 4 * 1024 * 1024
MAX_HEADER_BYTES = 1024 * 1024
MAX_MESSAGE_BYTES = 64 * 1024**3
"""Far above any run's state: a length beyond it is no length."""

PREFIX = struct.Struct("!II")


class BadFrame(Exception):
    """What came is not a frame."""


class OutOfMemory(Exception):
    """The engine had no memory for a call."""


class EngineFailed(Exception):
    """A call ended with an error that nobody foresaw; the child's log has where."""


@dataclass(frozen=True, slots=True)
class Message:
    """A call (`fields["method"]`) or the answer to one."""

    fields: dict[str, Any]
    data: Sequence[bytes] = ()


def frames_of(number: int, message: Message) -> Iterator[bytes]:
    """The frames of a message, the first one at once."""
    sizes = [len(part) for part in message.data]
    pieces = [
        memoryview(part)[start : start + PIECE_BYTES]
        for part in message.data
        for start in range(0, len(part), PIECE_BYTES)
    ] or [memoryview(b"")]
    for index, piece in enumerate(pieces):
        header: dict[str, Any] = {"id": number, "last": index == len(pieces) - 1}
        if index == 0:
            header |= {"fields": message.fields, "sizes": sizes}
        encoded = json.dumps(header).encode()
        yield b"".join((PREFIX.pack(len(encoded), len(piece)), encoded, piece))


def lengths(prefix: bytes) -> tuple[int, int]:
    """Bytes of header and body that follow; BadFrame if that cannot be."""
    header_bytes, body_bytes = PREFIX.unpack(prefix)
    if header_bytes > MAX_HEADER_BYTES or body_bytes > PIECE_BYTES:
        raise BadFrame(f"a frame of {header_bytes} + {body_bytes} bytes")
    return header_bytes, body_bytes


@dataclass(slots=True)
class _Unfinished:
    fields: dict[str, Any]
    sizes: list[int]
    pieces: list[bytes] = field(default_factory=list)


class Assembler:
    """Messages out of the frames of one direction."""

    def __init__(self) -> None:
        self._unfinished: dict[int, _Unfinished] = {}

    def add(self, header: bytes, body: bytes) -> tuple[int, Message] | None:
        """The message that this frame completes, with its id. BadFrame if it fits nowhere."""
        try:
            known = json.loads(header)
            number, last = int(known["id"]), bool(known["last"])
            if "fields" in known:
                first = _Unfinished(dict(known["fields"]), [int(size) for size in known["sizes"]])
                self._unfinished[number] = first
            message = self._unfinished[number]
        except (ValueError, KeyError, TypeError) as error:
            raise BadFrame(f"{type(error).__name__}: {error}") from None
        message.pieces.append(body)
        total = sum(message.sizes)
        if total > MAX_MESSAGE_BYTES or min(message.sizes, default=0) < 0:
            raise BadFrame(f"a message of {total} bytes")
        if not last:
            return None
        del self._unfinished[number]
        whole = body if len(message.pieces) == 1 else b"".join(message.pieces)
        if len(whole) != total:
            raise BadFrame(f"{len(whole)} bytes of a message of {total}")
        return number, Message(message.fields, _split(whole, message.sizes))


def _split(whole: bytes, sizes: Sequence[int]) -> tuple[bytes, ...]:
    if len(sizes) == 1:
        return (whole,)
    parts, start = [], 0
    for size in sizes:
        parts.append(whole[start : start + size])
        start += size
    return tuple(parts)


class Channel:
    """The child's end of the socketpair: one thread receives, any thread sends."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._assembler = Assembler()
        self._sending = threading.Lock()

    def receive(self) -> tuple[int, Message]:
        """The next message; EOFError once the other end is closed."""
        while True:
            header_bytes, body_bytes = lengths(self._read(PREFIX.size))
            header = self._read(header_bytes)
            if (message := self._assembler.add(header, self._read(body_bytes))) is not None:
                return message

    def send(self, number: int, message: Message) -> None:
        for frame in frames_of(number, message):
            with self._sending:  # of one frame: messages from several threads take turns
                self._connection.sendall(frame)

    def _read(self, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        view, got = memoryview(data), 0
        while got < num_bytes:
            received = self._connection.recv_into(view[got:])
            if not received:
                raise EOFError
            got += received
        return bytes(data)


def error_message(error: Exception) -> Message:
    """An answer that raises the same error at the other end, as far as a caller acts on it."""
    name = type(error).__name__
    if isinstance(error, errors.LuthierError):
        return Message({"error": name, "detail": error.detail})
    if isinstance(error, ValueError | OutOfMemory | errors.ConfigError):
        name = next(known for kind, known in _NAMES.items() if isinstance(error, kind))
        return Message({"error": name, "detail": str(error)})
    return Message({"error": "EngineFailed", "detail": f"{name}: {error}"})


def error_of(answer: Message) -> Exception | None:
    """What to raise, if the answer is of an error."""
    if (name := answer.fields.get("error")) is None:
        return None
    detail = str(answer.fields.get("detail", ""))
    kind = getattr(errors, str(name), None)
    if isinstance(kind, type) and issubclass(kind, errors.LuthierError):
        return kind(detail)
    return _KINDS.get(str(name), EngineFailed)(detail)


_NAMES: dict[type[Exception], str] = {
    ValueError: "ValueError",
    OutOfMemory: "OutOfMemory",
    errors.ConfigError: "ConfigError",
}
_KINDS = {name: kind for kind, name in _NAMES.items()}
