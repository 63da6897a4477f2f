"""Fuzzes a whole stack through its own OpenAPI description, and looks at it afterwards."""

import argparse
import asyncio
import base64
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import aiohttp

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.contract.gateway_client import Api, Run, datum  # noqa: E402
from tests.contract.gateway_stack import KEYS, GatewayStack, running_gateway_stack  # noqa: E402

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
ANSWER_S = 45
"""A request that takes longer hangs: the SDK gives up then."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemathesis", default="st", help="its command")
    parser.add_argument("--seconds", type=int, default=300, help="how long it sends requests")
    parser.add_argument("--seed", type=int, help="repeat a run")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="lu-fz-") as folder,
        running_gateway_stack(Path(folder)) as stack,
    ):
        ids = asyncio.run(prepare(stack))
        code = fuzz(stack, options, ids)
        asyncio.run(check_state(stack, ids))
        print("the stack trains, loads and samples as before")
    return code


async def prepare(stack: GatewayStack) -> dict[str, list[str]]:
    """A run with checkpoints and a sampling session that the requests may name; their ids."""
    async with aiohttp.ClientSession() as http:
        api = Api(http, stack.url, KEYS["ann"])
        run = await api.run()
        await api.result(await run.send("save_weights", path="x"))
        await api.result(await run.send("save_weights_for_sampler", path="x"))
        sampler = await api.sampler(run.run_id.partition(":")[0], base_model="tiny/base")
        path = f"tinker://{run.run_id}/weights/x"
        # The requests work on this run; what is looked at afterwards belongs to another session.
        spared = await api.run()
        kept = await api.result(await spared.send("save_weights", path="kept"))
        session_id = run.run_id.partition(":")[0]
        return {
            "run_id": [run.run_id],
            "model_id": [run.run_id],
            "session_id": [session_id],
            "sampler_id": [sampler.session_id],
            "sampling_session_id": [sampler.session_id],
            "tinker_path": [path],
            "path": [path, "x", "y"],
            "source_path": [path],
            "model_path": [path],
            "request_id": [f"{run.run_id}:0", f"{run.run_id}:1"],
            "name": ["x"],
            "base_model": ["tiny/base"],
            "forward_backward": [as_text(run, seq) for seq in range(3, 40)],
            "spared": [spared.run_id, str(kept["path"])],
        }


def as_text(run: Run, seq: int) -> str:
    message = run.message(datum(), datum([4, 5]), seq_id=seq)
    return base64.b64encode(message.SerializeToString()).decode()


def fuzz(stack: GatewayStack, options: argparse.Namespace, ids: dict[str, list[str]]) -> int:
    argv = [options.schemathesis, "run", f"{stack.url}/api/v1/openapi.json"]
    argv += ["-H", f"X-API-Key: {KEYS['ann']}", "--checks", ",".join(CHECKS)]
    # Its own key must not be taken away, or everything that follows is a 401.
    argv += ["--exclude-path", "/api/v1/auth/apikey/me", "--phases", "examples,coverage,fuzzing"]
    argv += ["--max-time", str(options.seconds), "--request-timeout", str(ANSWER_S)]
    argv += ["--continue-on-failure", "--suppress-health-check", "all", "--warnings", "off"]
    if options.seed is not None:
        argv += ["--seed", str(options.seed)]
    environ = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks",
        "FUZZ_IDS": json.dumps(ids),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(argv, env=environ, cwd=ROOT, check=False).returncode


async def check_state(stack: GatewayStack, ids: dict[str, list[str]]) -> None:
    """AssertionError unless what nobody touched still works."""
    run_id, path = ids["spared"]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
        api = Api(http, stack.url, KEYS["ann"])
        assert (await api.get("healthz")).status == 200
        run = Run(api, run_id, next_seq=2)
        output = await api.training_output(await run.forward_backward(datum([7, 8, 9])))
        assert output.metrics["loss:sum"] > 0
        await api.result(await run.step())
        await api.result(await run.send("load_weights", path=path, optimizer=True))
        assert (await (await api.sampler(model_path=path)).sample()).sequences
        for url in ("training_runs", "checkpoints?limit=1000", "sessions"):
            assert (await api.get(url)).status == 200


if __name__ == "__main__":
    sys.exit(main())
