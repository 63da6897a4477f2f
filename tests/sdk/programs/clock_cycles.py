"""Pipelined steps: the next one is submitted before the last one's results are waited for."""

import asyncio

import numpy as np
import tinker
from tinker import types


def dummy_datum() -> types.Datum:
    n = 48
    return types.Datum(
        model_input=types.ModelInput.from_ints(np.arange(n).tolist()),
        loss_fn_inputs={
            "weights": np.ones(n, dtype=np.float32),
            "target_tokens": np.arange(n, dtype=np.int64),
        },
    )


async def main() -> None:
    service_client = tinker.ServiceClient()
    training_client = await service_client.create_lora_training_client_async(
        base_model="luthier/demo", seed=1
    )
    cycles, pending = [], None
    for _ in range(5):
        fwdbwd_future = await training_client.forward_backward_async(
            [dummy_datum()], loss_fn="cross_entropy"
        )
        optim_future = await training_client.optim_step_async(
            adam_params=types.AdamParams(learning_rate=1e-4)
        )
        if pending is not None:
            cycles.append((await pending[0]).metrics["clock_cycle:unique"])
            await pending[1]
        pending = (fwdbwd_future, optim_future)
    assert pending is not None
    cycles.append((await pending[0]).metrics["clock_cycle:unique"])
    await pending[1]
    assert cycles == sorted(cycles)
    print("steps", len(cycles))


asyncio.run(main())
