"""What the network and the server do wrong is no exception in the user's program."""

import base64
import gc
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.acceptance.stack import ANSWER_S, Stack, wait_until
from tests.sdk.conftest import BASE_MODEL, KEYS
from tests.sdk.faulty_proxy import FAULTS, FaultyProxy, running_proxy

import luthier
from luthier import types

PROMPT = types.ModelInput.from_ints([5, 6, 7])


def train_and_sample(service: luthier.ServiceClient, num_steps: int = 6) -> list[object]:
    """Everything that a program sees of a run that is the same every time."""
    training = service.create_lora_training_client(BASE_MODEL, rank=4, seed=1)
    inputs = {"target_tokens": [6, 7, 8], "weights": [1.0] * 3}
    data = [types.Datum(types.ModelInput.from_ints([5, 6, 7]), inputs)]
    steps = [
        (
            training.forward_backward(data, "cross_entropy"),
            training.optim_step(types.AdamParams(learning_rate=1e-3)),
        )
        for _ in range(num_steps)
    ]
    seen: list[object] = [gradient.result(ANSWER_S).loss for gradient, _ in steps]
    seen += [(update.result(ANSWER_S).metrics or {})["grad_norm"] for _, update in steps]
    seen.append(training.save_state("end").result(ANSWER_S).path.rpartition("/")[2])
    sampling = training.save_weights_and_get_sampling_client()
    params = [types.SamplingParams(max_tokens=4, seed=seed) for seed in range(40)]
    samples = [sampling.sample(PROMPT, 1, one) for one in params]
    return [*seen, *(sample.result(ANSWER_S).sequences[0].tokens for sample in samples)]


@pytest.mark.parametrize("network", FAULTS)
def test_a_bad_network_changes_nothing_but_the_time(
    network: str,
    service: luthier.ServiceClient,
    stack: Stack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("luthier.transport._backoff_s", lambda attempt: 0.02)
    monkeypatch.setattr("luthier.polling.WORDLESS_BACKOFF_S", 0.02)
    expected = train_and_sample(service)
    with (
        running_proxy(FaultyProxy(stack.url, FAULTS[network])) as proxy,
        luthier.ServiceClient(base_url=proxy.url, api_key=KEYS["ann"]) as behind,
    ):
        assert train_and_sample(behind) == expected
    assert set(proxy.seen) == set(FAULTS[network])


@pytest.mark.slow
def test_a_killed_gateway_is_a_pause(service: luthier.ServiceClient, stack: Stack) -> None:
    expected = train_and_sample(service, num_steps=30)
    with luthier.ServiceClient(base_url=stack.url, api_key=KEYS["ann"]) as other:
        other.create_lora_training_client(BASE_MODEL, rank=4).result()
        stack.kill("gateway")
        assert train_and_sample(other, num_steps=30) == expected


@pytest.mark.slow
def test_a_restart_of_the_whole_server_is_a_pause(
    service: luthier.ServiceClient, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.transport._backoff_s", lambda attempt: 0.1)
    expected = train_and_sample(service, num_steps=30)
    with (
        luthier.ServiceClient(base_url=stack.url, api_key=KEYS["ann"]) as other,
        ThreadPoolExecutor(1) as program,
    ):
        other.create_lora_training_client(BASE_MODEL, rank=4).result()
        seen = program.submit(train_and_sample, other, 30)
        stack.stop()
        stack.start()
        assert seen.result() == expected


def test_a_wrong_key_is_told_at_once(stack: Stack) -> None:
    with luthier.ServiceClient(base_url=stack.url, api_key="tml-nobody") as service:
        training = service.create_lora_training_client(BASE_MODEL)
        with pytest.raises(luthier.AuthenticationError, match="401"):
            training.result(ANSWER_S)


def test_where_no_server_is_the_error_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.transport.FIRST_PATIENCE_S", 0.1)
    rest = luthier.RestClient(base_url="http://127.0.0.1:9", api_key="tml-any")
    with pytest.raises(luthier.APIConnectionError, match="Cannot connect"):
        rest.get_server_capabilities().result(ANSWER_S)


def test_somebody_elses_run_is_not_found(training: luthier.TrainingClient, stack: Stack) -> None:
    stranger = luthier.RestClient(base_url=stack.url, api_key=KEYS["bob"])
    with pytest.raises(luthier.NotFoundError):
        stranger.get_training_run(training.model_id).result()


# --- how sessions end -----------------------------------------------------------------------------


def is_finished(stack: Stack, session_id: str) -> bool:
    """Whether the server has been told that the session is over."""
    beat = {"session_id": session_id}
    return stack.request("POST", "session_heartbeat", beat, api_key=KEYS["ann"]).status == 410


def test_a_with_block_ends_its_session(stack: Stack) -> None:
    with luthier.ServiceClient(base_url=stack.url, api_key=KEYS["ann"]) as service:
        training = service.create_lora_training_client(BASE_MODEL, rank=4).result()
        session_id = training.model_id.partition(":")[0]
        assert not is_finished(stack, session_id)
    assert is_finished(stack, session_id)
    with pytest.raises(luthier.ClosedError):
        training.optim_step()
    with pytest.raises(luthier.ClosedError):
        service.create_lora_training_client(BASE_MODEL)


def test_a_client_that_is_dropped_ends_its_session(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.session.HEARTBEAT_S", 0.05)
    service = luthier.ServiceClient(base_url=stack.url, api_key=KEYS["ann"])
    sampling = service.create_sampling_client(base_model=BASE_MODEL)
    session_id = json.loads(base64.urlsafe_b64decode(sampling.get_sampler_handle()))[1]
    del service
    assert sampling.compute_logprobs(PROMPT).result()
    del sampling
    gc.collect()
    wait_until(lambda: is_finished(stack, session_id), "end of the session", timeout_s=ANSWER_S)


ENDS = {
    "an end without close": ("", 0),
    "an exception": ("raise ZeroDivisionError", 1),
    "ctrl-c": ("print('waiting', flush=True); [f.result() for f in futures]", -signal.SIGINT),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_ends_leaves_no_session_behind(
    end: str, stack: Stack, tmp_path: Path
) -> None:
    statement, exit_code = ENDS[end]
    program = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
import luthier
from luthier import types
service = luthier.ServiceClient()
sampling = service.create_sampling_client(base_model="{BASE_MODEL}").result()
print(sampling._opening.result().session_id, flush=True)
params = types.SamplingParams(max_tokens=200, stop=[])
futures = [sampling.sample(types.ModelInput.from_ints([5]), 8, params) for _ in range(50)]
{statement}
"""
    environ = {**os.environ, "TINKER_BASE_URL": stack.url, "TINKER_API_KEY": KEYS["ann"]}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        session_id = process.stdout.readline().strip()
        if end == "ctrl-c":
            assert process.stdout.readline() == "waiting\n"
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=ANSWER_S)
    assert process.returncode == exit_code, errors
    assert "never retrieved" not in errors
    assert is_finished(stack, session_id)
