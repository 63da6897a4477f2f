"""What a model reads: a list of chunks, each of text tokens, an image or audio."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, PlainSerializer

from luthier.types._base import StrictBase


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _from_base64(value: Any) -> Any:
    return base64.b64decode(value, validate=True) if isinstance(value, str) else value


def _to_base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


Tokens = Annotated[list[int], BeforeValidator(_as_list)]
"""Token ids: any sequence or one-dimensional integer array; kept as a list."""
Bytes = Annotated[
    bytes, BeforeValidator(_from_base64), PlainSerializer(_to_base64, when_used="json")
]
"""Raw bytes; base64 in JSON."""


class EncodedTextChunk(StrictBase):
    """Token ids of text, as the model's tokenizer gives them."""

    tokens: Tokens
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


class ImageChunk(StrictBase):
    """An image file. The server counts its tokens; a wrong `expected_tokens` is an error."""

    data: Bytes
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image"] = "image"

    @property
    def length(self) -> int:
        """`expected_tokens`; ValueError if it is not given."""
        return _expected(self.expected_tokens)


class ImageAssetPointerChunk(StrictBase):
    """An image that the server already has, by its location."""

    location: str
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image_asset_pointer"] = "image_asset_pointer"

    @property
    def length(self) -> int:
        """`expected_tokens`; ValueError if it is not given."""
        return _expected(self.expected_tokens)


class DmelChunk(StrictBase):
    """Audio features as a serialized tensor; its first dimension counts tokens."""

    dmel: Bytes
    type: Literal["dmel"] = "dmel"

    @property
    def length(self) -> int:
        """The first dimension, as the container's header has it (wire protocol 3.2)."""
        header = self.dmel[1:] if self.dmel[:1] == b"\xfe" else self.dmel
        length = shift = 0
        for byte in header[2:12]:  # after the dtype and the number of dimensions: a varint
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return length
        raise ValueError("dmel: no tensor container")


ModelInputChunk = Annotated[
    EncodedTextChunk | ImageChunk | ImageAssetPointerChunk | DmelChunk,
    Field(discriminator="type"),
]


class ModelInput(StrictBase):
    """The input of a forward pass, or a prompt: chunks in order."""

    chunks: list[ModelInputChunk]

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> "ModelInput":
        """One text chunk of these token ids."""
        return cls(chunks=[EncodedTextChunk(tokens=tokens)])

    @classmethod
    def empty(cls) -> "ModelInput":
        """No chunks: to append to."""
        return cls(chunks=[])

    def to_ints(self) -> list[int]:
        """All token ids; ValueError if a chunk is not text."""
        tokens: list[int] = []
        for chunk in self.chunks:
            if not isinstance(chunk, EncodedTextChunk):
                raise ValueError(f"to_ints: a chunk is of type {chunk.type!r}, not encoded_text")
            tokens += chunk.tokens
        return tokens

    @property
    def length(self) -> int:
        """Number of positions; ValueError if an image without expected_tokens is in it."""
        return sum(chunk.length for chunk in self.chunks)

    def append(self, chunk: ModelInputChunk) -> "ModelInput":
        """A copy with one chunk more."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> "ModelInput":
        """A copy with one token more, in the last chunk if that is text."""
        last = self.chunks[-1] if self.chunks else None
        if not isinstance(last, EncodedTextChunk):
            return self.append(EncodedTextChunk(tokens=[token]))
        return ModelInput(
            chunks=[*self.chunks[:-1], EncodedTextChunk(tokens=[*last.tokens, token])]
        )


def _expected(expected_tokens: int | None) -> int:
    if expected_tokens is None:
        raise ValueError("length: an image has one only with expected_tokens")
    return expected_tokens
