"""Which bodies may be worked on where the other requests wait."""

from aiohttp.test_utils import make_mocked_request

from luthier_gateway.forward_backward import _size_of

MAX_BYTES = 10**9


def test_a_compressed_body_counts_as_much_as_it_may_become() -> None:
    headers = {"Content-Length": "100", "Content-Encoding": "zstd"}
    compressed = make_mocked_request("POST", "/", headers=headers)
    assert _size_of(compressed, MAX_BYTES) == MAX_BYTES
    plain = make_mocked_request("POST", "/", headers={"Content-Length": "100"})
    assert _size_of(plain, MAX_BYTES) == 100
