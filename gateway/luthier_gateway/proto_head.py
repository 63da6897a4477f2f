"""The first two fields of a ForwardBackwardRequest, read from the head of a body of any size."""

_MODEL_ID_TAG = 0x0A  # field 1, length-delimited
_SEQ_ID_TAG = 0x10  # field 2, varint


def read_ids(head: bytes) -> tuple[str, int] | None:
    """(model_id, seq_id), which the SDK writes first; None if the bytes do not begin with them."""
    try:
        if head[0] != _MODEL_ID_TAG:
            return None
        length, at = _varint(head, 1)
        model_id = head[at : at + length].decode()
        at += length
        if head[at] != _SEQ_ID_TAG:
            return None
        seq, _ = _varint(head, at + 1)
    except (IndexError, UnicodeDecodeError):
        return None
    return (model_id, seq) if 1 <= seq < 2**31 else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError("varint of more than ten bytes")
