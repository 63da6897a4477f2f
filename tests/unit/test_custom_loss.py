"""Uploaded losses: the same numbers as in the client, and nothing that is not allowed."""

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_qwen3 import save_tiny_qwen3
from tests.unit.test_trainer_engine import STEP, datum, float32, int64, logprobs_of, request, run_op
from tinker.lib.public_interfaces.custom_loss import LossHandle, encode_graph, trace_loss
from torch import Tensor

from luthier_core.errors import BadRequest, InvalidField, Unsupported
from luthier_core.loss_graph import MAX_NODES, graph_of_id, loss_id_of, parse_loss_graph
from luthier_core.proto import wire_pb2
from luthier_core.validation import ModelLimits, check_forward_backward
from luthier_model.base import load_base_model
from luthier_model.lora import LoraSpec
from luthier_trainer import custom_loss
from luthier_trainer.engine import Engine

VOCAB_SIZE = 61
LENGTHS = (5, 3, 7)
LIMITS = ModelLimits(
    vocab_size=VOCAB_SIZE,
    max_context_tokens=32,
    max_datums=8,
    max_tokens_per_request=64,
    max_num_samples=1,
    custom_losses=True,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = save_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=3, vocab_size=VOCAB_SIZE)
    return Engine(load_base_model("tiny", folder), logprob_chunk_tokens=8, num_threads=1)


def ppo(logprobs: Tensor, sampled: Tensor, advantages: Tensor) -> Any:
    ratio = torch.exp(logprobs - sampled)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    ones = torch.ones_like(ratio)
    return loss.sum(), {"custom/ratio:mean": ratio.mean(), "custom/tokens:sum": ones.sum()}


def preference(logprobs: Tensor, mask: Tensor, reference: Tensor) -> Any:
    gain = torch.where(mask > 0, logprobs, torch.zeros_like(logprobs)).sum() - reference
    return -torch.nn.functional.logsigmoid(0.1 * gain), {"custom/gain:mean": gain.detach()}


def tail(logprobs: Tensor, sampled: Tensor) -> Any:
    half = logprobs.shape[0] // 2
    late = logprobs[half:, None].squeeze(1)
    loss = torch.nn.functional.huber_loss(late, sampled[half:], reduction="sum") / max(1, 2)
    return loss + late.logsumexp(0) ** 2, {}


def distilled(logprobs: Tensor, target: Tensor) -> Any:
    return -(target * logprobs).sum(dim=-1).sum(), {"custom/top:mean": logprobs[:, 0].mean()}


RANKS: dict[Callable[..., Any], dict[str, Any]] = {
    ppo: {"logprobs": 1, "sampled": 1, "advantages": 1},
    preference: {"logprobs": 1, "mask": 1, "reference": 0},
    tail: {"logprobs": 1, "sampled": 1},
    distilled: {"logprobs": 2, "target": 2},
}


def traced(loss: Callable[..., Any]) -> tuple[LossHandle, list[dict[str, Any]], dict[str, Any]]:
    """As the official SDK traces and sends it."""
    handle = trace_loss(loss, RANKS[loss], "session")
    inputs = [{"name": known.name, "rank": known.rank} for known in handle.inputs]
    graph = {"format": 1, "nodes": [dict(node) for node in encode_graph(handle).nodes]}
    return handle, inputs, json.loads(json.dumps(graph))


def data_for(loss: Callable[..., Any]) -> list[wire_pb2.Datum]:
    draw = np.random.default_rng(4)
    data = []
    for length in LENGTHS:
        width = [2] if RANKS[loss]["logprobs"] == 2 else []
        targets = draw.integers(0, VOCAB_SIZE, [length, *width])
        inputs = {"target_tokens": tensor(targets, int64)}
        for name, rank in list(RANKS[loss].items())[1:]:
            shape = [length, 2][:rank]
            shift = 4 if name == "sampled" else 0
            inputs[name] = tensor(draw.normal(size=shape) - shift, float32)
        data.append(datum(draw.integers(0, VOCAB_SIZE, length).tolist(), **inputs))
    return data


def tensor(values: Any, encode: Callable[[object], wire_pb2.Tensor]) -> wire_pb2.Tensor:
    made = encode(np.reshape(values, -1))
    made.shape.extend(np.shape(values))
    return made


def custom_request(data: list[wire_pb2.Datum], loss_id: str) -> bytes:
    message = wire_pb2.ForwardBackwardRequest.FromString(request(*data, loss_fn="custom"))
    message.loss_fn_config_v2["loss_id"].text = loss_id
    check_forward_backward(message, LIMITS)
    return message.SerializeToString()


@pytest.mark.parametrize("loss", RANKS)
def test_the_servers_result_is_that_of_the_client(engine: Engine, loss: Callable[..., Any]) -> None:
    handle, inputs, graph = traced(loss)
    data = data_for(loss)
    for run_id in ("server", "client"):
        engine.create(run_id, LoraSpec(rank=4, seed=1))
        run_op(engine, request(*data_with(data, 0.3)), run_id)  # B is not 0 from here
        engine.optim_step(run_id, STEP)

    output = run_op(engine, custom_request(data, loss_id_of(inputs, graph)), "server")

    forward = run_op(engine, request(*data_with(data, 0.0)), "client", backward=False)
    total, metrics, gradients = 0.0, [], []
    for at, array in zip(data, logprobs_of(forward), strict=True):
        leaf = torch.tensor(array, requires_grad=True)
        given = [torch.tensor(decoded(at.loss_fn_inputs[name])) for name in handle.input_names]
        value, its_metrics = handle.graph(leaf, *given)
        value.backward()
        total += value.item()
        metrics.append({name: number.item() for name, number in its_metrics.items()})
        gradients.append(-leaf.grad.numpy())
    run_op(engine, request(*data_with(data, gradients)), "client")

    assert [a.tolist() for a in logprobs_of(output)] == [a.tolist() for a in logprobs_of(forward)]
    assert output.metrics["loss:sum"] == pytest.approx(total, rel=1e-6)
    for name in metrics[0]:
        values = [its[name] for its in metrics]
        wanted = np.mean(values) if name.endswith(":mean") else np.sum(values)
        assert output.metrics[name] == pytest.approx(wanted, rel=1e-6)
    norms = [engine.optim_step(run_id, STEP) for run_id in ("server", "client")]
    assert norms[0]["grad_norm"] == pytest.approx(norms[1]["grad_norm"], rel=1e-5)
    assert norms[0]["param_norm"] == pytest.approx(norms[1]["param_norm"], rel=1e-6)


def data_with(data: list[wire_pb2.Datum], weights: Any) -> list[wire_pb2.Datum]:
    """The same data for cross_entropy."""
    made = []
    for index, at in enumerate(data):
        targets = at.loss_fn_inputs["target_tokens"]
        each = weights[index] if isinstance(weights, list) else np.full(targets.shape, weights)
        inputs = {"target_tokens": targets, "weights": tensor(each, float32)}
        made.append(wire_pb2.Datum(model_input=at.model_input, loss_fn_inputs=inputs))
    return made


def decoded(given: wire_pb2.Tensor) -> np.ndarray:
    return np.frombuffer(given.dense, "<f4").reshape(tuple(given.shape)).copy()


def test_an_id_is_the_graph() -> None:
    _, inputs, graph = traced(ppo)
    assert graph_of_id(loss_id_of(inputs, graph)) == parse_loss_graph(inputs, graph)


def test_without_the_setting_a_custom_loss_is_refused_with_the_way_to_go() -> None:
    message = wire_pb2.ForwardBackwardRequest(loss_fn="custom", data=data_for(ppo))
    limits = ModelLimits(
        vocab_size=VOCAB_SIZE,
        max_context_tokens=32,
        max_datums=8,
        max_tokens_per_request=64,
        max_num_samples=1,
    )
    with pytest.raises(Unsupported, match="in the client"):
        check_forward_backward(message, limits)


@pytest.mark.parametrize("loss_id", ["", "graph1.", "graph1.eJw", "x", "graph1." + "A" * 70_000])
def test_an_id_that_is_none_is_refused(loss_id: str) -> None:
    with pytest.raises(InvalidField, match="loss_id"):
        graph_of_id(loss_id)


def call(target: str, *args: Any, op: str = "call_function", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": "x", "target": target, "args": list(args), "kwargs": kwargs}


REF = {"ref": "logprobs"}
INPUTS = [{"name": "logprobs", "rank": 1}]


def graph_with(*nodes: dict[str, Any]) -> dict[str, Any]:
    """logprobs, these nodes, and the sum of the last as the loss."""
    first = {"op": "placeholder", "name": "logprobs", "target": "logprobs"}
    total = {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "x"}]}
    pair = {"tuple": [{"ref": "total"}, {"dict": {}}]}
    output = {"op": "output", "name": "output", "target": "output", "args": [pair]}
    return {"format": 1, "nodes": [first, *nodes, total, output]}


@pytest.mark.parametrize(
    "node",
    [
        call("builtins.eval", "1"),
        call("torch.load", "/etc/passwd"),
        call("torch.ops.aten.exp", REF),
        call("torch.randn", 3),
        call("os.system", "true"),
        call("operator.attrgetter", "x"),
        call("builtins.getattr", REF, "__class__"),
        call("getattr", REF, "data"),
        call("getattr", REF, {"ref": "logprobs"}),
        call("item", REF, op="call_method"),
        call("backward", REF, op="call_method"),
        call("__class__", REF, op="call_method"),
        call("apply_", REF, op="call_method"),
        call("weight", op="get_attr"),
        call("net", REF, op="call_module"),
        call("torch.exp", {"ref": "x"}),
        call("torch.exp", {"ref": "total"}),
        call("torch.exp", REF, out=REF),
        call("torch.exp", {"device": "cuda"}),
        call("torch.exp", {"module": "os"}),
        call("torch.stack", [[[[[[[[[[REF]]]]]]]]]]),
        {**call("torch.exp", REF), "name": "logprobs"},
        {**call("torch.exp", REF), "name": "__import__('os')"},
    ],
    ids=lambda node: str(node["target"]),
)
def test_what_is_not_allowed_is_refused_before_it_is_run(node: dict[str, Any]) -> None:
    with pytest.raises(InvalidField, match="graph"):
        parse_loss_graph(INPUTS, graph_with(node))


def test_a_graph_of_too_many_nodes_is_refused() -> None:
    nodes = [{**call("torch.exp", REF), "name": f"x{n}"} for n in range(MAX_NODES)]
    with pytest.raises(InvalidField, match=f"at most {MAX_NODES}"):
        parse_loss_graph(INPUTS, graph_with(*nodes, call("torch.exp", REF)))


def run_graph(engine: Engine, *nodes: dict[str, Any]) -> wire_pb2.ForwardBackwardOutput:
    graph = graph_with(*nodes)
    parse_loss_graph(INPUTS, graph)
    return run_op(engine, custom_request(data_for(ppo)[:1], loss_id_of(INPUTS, graph)))


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (
            [
                {**call("torch.unsqueeze", REF, 1), "name": "column"},
                call("expand", {"ref": "column"}, 5, 2**28, op="call_method"),
            ],
            "bytes in all",
        ),
        ([call("torch.full_like", REF, 1.0)], "does not depend on logprobs"),
        ([call("torch.exp", REF, 1, 2, 3)], "torch.exp"),
        ([call("operator.getitem", REF, 99)], "operator.getitem"),
        ([call("operator.mul", "ab", 2**30)], "neither a tensor nor a number"),
        (
            [{**call("operator.pow", 9.0, 9e9), "name": "y"}, call("torch.mul", REF, {"ref": "y"})],
            "operator.pow",
        ),
        ([call("torch.where", REF)], "torch.where"),
        ([call("operator.floordiv", REF, 2.0)], "floor_divide"),
        ([call("operator.add", [1], [2])], "neither a tensor nor a number"),
        (
            [
                {**call("getattr", REF, "shape"), "name": "y"},
                call("sum", {"ref": "y"}, op="call_method"),
            ],
            "no tensor",
        ),
    ],
)
def test_what_cannot_be_computed_fails_the_op_with_the_step_and_leaves_the_run_alone(
    engine: Engine, nodes: list[dict[str, Any]], said: str
) -> None:
    engine.create("run", LoraSpec(rank=4, seed=1))
    before = engine.run_digest("run")
    with pytest.raises(BadRequest, match=said):
        run_graph(engine, *nodes)
    assert engine.run_digest("run") == before


def test_a_graph_that_takes_too_long_is_stopped(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom_loss, "DEADLINE_S", -1.0)
    engine.create("run", LoraSpec(rank=4, seed=1))
    with pytest.raises(BadRequest, match="took longer"):
        run_graph(engine, call("torch.exp", REF))


def test_of_a_thousand_graphs_made_at_random_none_does_more_than_fail(engine: Engine) -> None:
    engine.create("run", LoraSpec(rank=4, seed=1))
    draw = random.Random(1)
    targets = [*sorted(custom_loss.FUNCTIONS), "torch.load", "builtins.eval", "torch.ops.x"]
    methods = [*sorted(custom_loss.METHODS), "__reduce__", "numpy", "backward"]
    num_run = 0
    for _ in range(1000):
        nodes = []
        for n in range(draw.randint(1, 4)):
            refs = [REF, *({"ref": node["name"]} for node in nodes)]
            values = [
                *refs,
                0,
                1,
                -1,
                2.5,
                2**40,
                "sum",
                None,
                True,
                {"float": "inf"},
                {"slice": [None, 2, None]},
                {"tuple": [1, -1]},
                {"dtype": "float64"},
                [REF, REF],
            ]
            args = [draw.choice(refs), *draw.choices(values, k=draw.randint(0, 2))]
            is_method = draw.random() < 0.4
            target = draw.choice(methods if is_method else targets)
            node = call(target, *args, op="call_method" if is_method else "call_function")
            nodes.append({**node, "name": f"n{n}"})
        nodes[-1]["name"] = "x"
        try:
            run_graph(engine, *nodes)
            num_run += 1
        except BadRequest:
            pass
    assert num_run > 20  # or it would show nothing
