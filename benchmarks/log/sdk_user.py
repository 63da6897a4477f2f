"""A user of the official SDK, until the end of standard input. For bench_log.py.

    python sdk_user.py --url URL --tenant NAME --model NAME --ahead 1

Sends `--ahead` steps, then awaits them, over and over. Prints a JSON line: when each step ended and
how long it took, how many requests were answered with 429, and the exceptions that reached it.
"""

import argparse
import json
import logging
import os
import select
import sys
import time

import numpy as np

from log.rig import api_key
from log.traffic import NUM_TOKENS

PAUSE_S = 0.02


class Refusals(logging.Handler):
    """Counts the answers 429 that the SDK's HTTP client logs."""

    num = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.num += " 429 " in record.getMessage()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--tenant", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ahead", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["TINKER_TELEMETRY"] = "0"
    import tinker
    from tinker import types

    refusals = Refusals()
    http_log = logging.getLogger("httpx")
    http_log.setLevel(logging.INFO)
    http_log.addHandler(refusals)
    http_log.propagate = False
    service = tinker.ServiceClient(base_url=arguments.url, api_key=api_key(arguments.tenant))
    client = service.create_lora_training_client(base_model=arguments.model, rank=4).result()
    tokens = list(range(10, 11 + NUM_TOKENS))
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:], np.int64),
            "weights": np.ones(NUM_TOKENS, np.float32),
        },
    )
    print("ready", flush=True)
    steps: list[tuple[float, float]] = []
    errors: list[str] = []
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        start = time.monotonic()
        try:
            sent = []
            for _ in range(arguments.ahead):
                sent.append(client.forward_backward([datum], "cross_entropy"))
                sent.append(client.optim_step(types.AdamParams(learning_rate=1e-4)))
            for future in sent:
                future.result()
        except Exception as error:
            errors.append(repr(error))
            break
        steps.append((time.monotonic(), 1e3 * (time.monotonic() - start)))
    service.close("success")
    figures = {"steps": steps, "refusals": refusals.num, "errors": errors, "ahead": arguments.ahead}
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
