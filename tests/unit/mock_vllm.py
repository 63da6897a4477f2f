"""A stand-in for vLLM's server, of the part of its HTTP API that the engine uses: a mock.

python mock_vllm.py SOCKET LOG. Token t of a greedy answer is the prompt's length + t; LOG gets one
line per request. A prompt that begins with DIES ends the process, WAITS gets no answer, FAILS a 500
and NAN logprobs that are no numbers. The real one: tests/vllm.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from aiohttp import web

DIES, WAITS, FAILS, NAN = 100, 101, 102, 103


class MockVllm:
    def __init__(self, log: Path) -> None:
        self._log = log
        self._adapters: dict[str, str] = {}
        self.say("up", {})

    def say(self, what: str, body: dict[str, object]) -> None:
        with self._log.open("a") as file:
            file.write(json.dumps([what, body]) + "\n")

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.say("load", body)
        if body["lora_name"] in self._adapters:
            return error(400, "has already been loaded")
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return error(404, "No adapter found")
        self._adapters[body["lora_name"]] = body["lora_path"]
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.say("unload", body)
        del self._adapters[body["lora_name"]]
        return web.Response(text="Success")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.say("complete", body)
        if body["model"] != "tiny" and body["model"] not in self._adapters:
            return error(404, f"The model `{body['model']}` does not exist.")
        if body["prompt"][0] == DIES:
            os._exit(1)
        if body["prompt"][0] == FAILS:
            return error(500, "out of luck")
        if body["prompt"][0] == WAITS:
            try:
                await asyncio.sleep(3600)
            finally:
                self.say("aborted", {})
        choices = [choice(body, index) for index in range(body["n"])]
        usage = {"prompt_tokens_details": {"cached_tokens": 7}}
        if not body.get("stream"):
            return web.json_response({"choices": choices, "usage": usage})
        response = web.StreamResponse()
        await response.prepare(request)
        for event in ({"choices": choices}, {"choices": [], "usage": usage}):
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


def choice(body: dict[str, object], index: int) -> dict[str, object]:
    """As vLLM 0.32 answers with return_token_ids, return_tokens_as_token_ids and logprobs."""
    prompt: list[int] = body["prompt"]  # type: ignore[assignment]
    tokens = [len(prompt) + i + index for i in range(body["max_tokens"])]  # type: ignore[call-overload]
    logprob = float("nan") if prompt[0] == NAN else -0.5
    scored = [
        {str(token): {"logprob": -1.0, "rank": 3}, "9": {"logprob": -0.25}} for token in prompt
    ]
    return {
        "index": index,
        "text": "?",
        "finish_reason": "length",
        "token_ids": tokens,
        "logprobs": {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": [logprob] * len(tokens),
            "top_logprobs": [{f"token_id:{token}": -0.5, "token_id:9": -0.25} for token in tokens],
        },
        "prompt_logprobs": [None, *scored[1:]] if "prompt_logprobs" in body else None,
    }


def error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status)


def main() -> None:
    socket, log = sys.argv[1:]
    mock = MockVllm(Path(log))
    # Handlers end with their client, as vLLM's do.
    app = web.Application()
    app.router.add_get("/health", mock.health)
    app.router.add_post("/v1/load_lora_adapter", mock.load)
    app.router.add_post("/v1/unload_lora_adapter", mock.unload)
    app.router.add_post("/v1/completions", mock.complete)
    web.run_app(app, path=socket, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
