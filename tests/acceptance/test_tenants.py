"""Two tenants of one `luthier up`, told apart by their keys."""

from typing import Any

import pytest
import tinker
from tests.acceptance.conftest import KEYS
from tests.acceptance.stack import ANSWER_S, Stack
from tests.acceptance.training import ADAM, create_run


def test_what_is_one_tenants_is_not_found_by_the_other(shared_stack: Stack) -> None:
    with (
        shared_stack.service(KEYS["alpha"]) as alpha,
        shared_stack.service(KEYS["beta"]) as beta,
    ):
        run = create_run(alpha)
        run.optim_step(ADAM).result(timeout=ANSWER_S)
        state = run.save_state("state").result(timeout=ANSWER_S).path
        weights = run.save_weights_for_sampler("weights").result(timeout=ANSWER_S).path

        with pytest.raises(tinker.RequestFailedError, match="not yours"):
            beta.create_training_client_from_state(state).result()
        with pytest.raises(tinker.NotFoundError):
            beta.create_sampling_client(model_path=weights).result()
        assert run.model_id not in _listed_runs(shared_stack, KEYS["beta"])
        assert run.model_id in _listed_runs(shared_stack, KEYS["alpha"])
        for method, path, body in _requests(run.model_id, state, weights):
            statuses = [
                shared_stack.request(method, path, body, api_key=KEYS[tenant]).status
                for tenant in ("beta", "alpha")
            ]
            assert statuses == [404, 200], f"{method} {path} {body}"


def _requests(run_id: str, state: str, weights: str) -> list[tuple[str, str, Any]]:
    """Everything that names something of a tenant: method, path, body."""
    session_id = run_id.partition(":")[0]
    sampler_id = f"{session_id}:sample:99"
    sampler = {"session_id": session_id, "sampling_session_seq_id": 99, "model_path": weights}
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    sample = {"prompt": prompt, "num_samples": 1, "sampling_params": {"max_tokens": 1}}
    return [
        ("GET", f"sessions/{session_id}", None),
        ("POST", "session_heartbeat", {"session_id": session_id}),
        ("GET", f"training_runs/{run_id}", None),
        ("GET", f"training_runs/{run_id}/checkpoints", None),
        ("POST", "get_info", {"model_id": run_id}),
        ("POST", "optim_step", {"model_id": run_id, "seq_id": 4, "adam_params": {}}),
        ("POST", "retrieve_future", {"request_id": f"{run_id}:4"}),
        ("POST", "weights_info", {"tinker_path": state}),
        ("POST", "create_sampling_session", sampler),
        ("GET", f"samplers/{sampler_id}", None),
        ("POST", "asample", {"sampling_session_id": sampler_id, "seq_id": 0, **sample}),
        ("POST", "retrieve_future", {"request_id": f"{sampler_id}:0"}),
        ("DELETE", f"training_runs/{run_id}/checkpoints/weights/state", None),
    ]


def _listed_runs(stack: Stack, api_key: str) -> list[str]:
    runs = tinker.RestClient(base_url=stack.url, api_key=api_key).list_training_runs()
    return [run.training_run_id for run in runs.result(timeout=ANSWER_S).training_runs]
