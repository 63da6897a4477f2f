"""A request whose end is not sure is refused, and nothing after it is read (reliability S19)."""

import asyncio
from collections import Counter
from urllib.parse import urlsplit

from tests.contract.gateway_stack import GatewayStack
from tests.contract.smuggling import INNER, cases

ALONE = INNER.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
MIN_CASES = 200
MIN_CLASSES = 8
ANSWER_S = 5.0


async def answers(url: str, request: str) -> bytes:
    """All that the server says until it hangs up, as it must: it cannot know where it is."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request.encode())
        async with asyncio.timeout(ANSWER_S):
            return await reader.read()
    except ConnectionError:
        return b""
    except TimeoutError:
        return b" 200 it waits for more"
    finally:
        writer.close()


async def test_no_request_hides_another(gateway_stack: GatewayStack) -> None:
    assert b" 200 OK" in await answers(gateway_stack.url, ALONE)
    tried: Counter[str] = Counter()
    found = []
    for kind, request in cases():
        tried[kind] += 1
        said = await answers(gateway_stack.url, request)
        if b" 200 " in said or said.count(b"HTTP/1.1 4") > 1 or b"HTTP/1.1 5" in said:
            found.append((kind, request, said))
    assert not found, f"{len(found)}: {found[:3]}"
    assert tried.total() >= MIN_CASES, tried
    assert len(tried) >= MIN_CLASSES
    print(f"S19 smuggling: {tried.total()} requests in {len(tried)} classes, 0 divergences")
