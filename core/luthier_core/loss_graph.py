"""Losses that clients upload: a graph as plain data, checked against what is allowed, and its id.

The id is the graph itself, compressed. So nothing is stored that could be lost, swept or replaced,
a replay runs what ran before, and the id of another tenant tells nothing that its holder does not
have already. Source: wire protocol 7.4; reliability S12.
"""

import base64
import binascii
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier_core.errors import InvalidField
from luthier_core.proto import wire_pb2 as wire

LOSS_FN = "custom"
MAX_NODES = 2000
MAX_INPUTS = 16
MAX_DEPTH = 8
"""Of the arguments of a node."""
MAX_GRAPH_BYTES = 1024 * 1024
"""Of its JSON."""
MAX_ID_CHARS = 64 * 1024
_PREFIX = "graph1."


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BOTH = _names("""
abs add sub mul div max min sort topk matmul neg exp expm1 log log1p log2 log10 sqrt rsqrt square
pow sigmoid tanh relu erf
sin cos sign clamp clip clamp_min clamp_max minimum maximum where sum mean prod amin amax var std
logsumexp softmax log_softmax cumsum lt le gt ge eq ne logical_and logical_or logical_not
logical_xor isfinite isnan isinf floor ceil round nan_to_num numel flip unsqueeze squeeze reshape
transpose flatten gather index_select masked_fill dot any all lerp addcmul addcdiv detach
""")
"""Functions of torch that are methods of a tensor too. None of them is random or works in place."""
_FUNCTIONS_ONLY = _names("zeros_like ones_like full_like stack cat")
_METHODS_ONLY = _names("float double long bool size dim expand expand_as view contiguous clone")
_FUNCTIONAL = _names("""
relu softmax log_softmax sigmoid tanh silu leaky_relu elu huber_loss mse_loss smooth_l1_loss l1_loss
binary_cross_entropy_with_logits kl_div
""")
_OPERATORS = _names("""
add sub mul truediv floordiv mod pow neg pos abs lt le gt ge eq ne and_ or_ xor invert not_ getitem
""")
_MATH = _names("sqrt exp log log1p expm1 floor ceil tanh")

FUNCTIONS: frozenset[str] = frozenset(
    [f"torch.{name}" for name in _BOTH | _FUNCTIONS_ONLY]
    + [f"torch.nn.functional.{name}" for name in _FUNCTIONAL]
    # What torch.fx calls logsigmoid, softplus and gelu of torch.nn.functional.
    + [f"torch._C._nn.{name}" for name in ("log_sigmoid", "softplus", "gelu")]
    + [f"operator.{name}" for name in _OPERATORS]
    + [f"math.{name}" for name in _MATH]
    + ["getattr"]
)
METHODS = _BOTH | _METHODS_ONLY
ATTRIBUTES = _names("shape ndim dtype T mT")
DTYPES = _names("float32 float64 int64 bool")

_IN_PLACE = _names("out inplace")
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")


@dataclass(frozen=True, slots=True)
class Node:
    """One step; an argument is a JSON scalar, a list, or an object of one key (see the wire)."""

    op: str
    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Input:
    """What a placeholder stands for."""

    name: str
    """logprobs, or a key of loss_fn_inputs."""
    rank: int
    """0: a number, 1: [T], 2: [T, K]"""
    node: str


@dataclass(frozen=True, slots=True)
class LossGraph:
    """A loss of one datum, checked: every node refers to earlier ones only."""

    inputs: tuple[Input, ...]
    """The first is logprobs."""
    steps: tuple[Node, ...]
    """Calls, in their order."""
    loss: str
    """The node that is the loss, ..."""
    metrics: Mapping[str, str]
    """... and those of the metrics, by name:reduction."""


def parse_loss_graph(inputs: Any, graph: Any) -> LossGraph:
    """InvalidField says what is wrong, or not allowed."""
    declared = tuple(_parse_input(value, index) for index, value in enumerate(_list(inputs)))
    names = [name for name, _ in declared]
    if not declared or len(declared) > MAX_INPUTS or names[0] != "logprobs":
        raise InvalidField(f"inputs: logprobs and at most {MAX_INPUTS - 1} more are needed")
    if len(set(names)) != len(names) or declared[0][1] == 0:
        raise InvalidField("inputs: a name is there twice, or logprobs has rank 0")
    if not isinstance(graph, dict) or graph.get("format", 1) != 1:
        raise InvalidField("graph.format: must be 1")
    nodes = [_parse_node(value, index) for index, value in enumerate(_list(graph.get("nodes")))]
    if not 2 <= len(nodes) <= MAX_NODES:
        raise InvalidField(f"graph.nodes: {len(nodes)} nodes; at most {MAX_NODES}")
    _check_names(nodes)
    *before, output = nodes
    placeholders, steps = before[: len(names)], before[len(names) :]
    if [node.target for node in placeholders if node.op == "placeholder"] != names:
        raise InvalidField(f"graph.nodes: must begin with the placeholders {names}")
    for node in steps:
        _check_call(node)
    loss, metrics = _parse_output(output)
    if loss in {node.name for node in placeholders}:
        raise InvalidField("graph.nodes: the loss must be computed")
    known = zip(declared, placeholders, strict=True)
    return LossGraph(
        inputs=tuple(Input(name, rank, node.name) for (name, rank), node in known),
        steps=tuple(steps),
        loss=loss,
        metrics=metrics,
    )


def loss_id_of(inputs: Any, graph: Any) -> str:
    """The id of a graph that has passed parse_loss_graph."""
    data = json.dumps([inputs, graph], separators=(",", ":"), sort_keys=True).encode()
    text = base64.urlsafe_b64encode(zlib.compress(data, 9)).decode()
    if len(data) > MAX_GRAPH_BYTES or len(text) > MAX_ID_CHARS - len(_PREFIX):
        raise InvalidField(f"graph: too large; its JSON may have {MAX_GRAPH_BYTES} bytes")
    return _PREFIX + text


def graph_of_id(loss_id: str) -> LossGraph:
    """The graph that an id stands for; InvalidField if it is none of ours."""
    unknown = InvalidField("loss_fn_config.loss_id: not an id that create_custom_loss has given")
    if not loss_id.startswith(_PREFIX) or len(loss_id) > MAX_ID_CHARS:
        raise unknown
    try:
        packed = base64.urlsafe_b64decode(loss_id.removeprefix(_PREFIX).encode())
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(packed, MAX_GRAPH_BYTES)
        if not unpacking.eof:
            raise unknown
        inputs, graph = json.loads(data)
    except (ValueError, binascii.Error, zlib.error, RecursionError):
        raise unknown from None
    return parse_loss_graph(inputs, graph)


def loss_graph(request: wire.ForwardBackwardRequest) -> LossGraph:
    """The loss of a request whose loss_fn is custom."""
    given = {*request.loss_fn_config, *request.loss_fn_config_v2}
    if given != {"loss_id"} or not request.loss_fn_config_v2["loss_id"].HasField("text"):
        raise InvalidField("loss_fn_config: custom takes loss_id, a text, and nothing else")
    return graph_of_id(request.loss_fn_config_v2["loss_id"].text)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidField("inputs and graph.nodes: must be lists")
    return value


def _parse_input(value: Any, index: int) -> tuple[str, int]:
    match value:
        case {"name": str(name), "rank": 0 | 1 | 2 as rank} if _INPUT_NAME.fullmatch(name):
            return name, int(rank)
    raise InvalidField(f"inputs[{index}]: must have a lowercase name and a rank of 0, 1 or 2")


def _parse_node(value: Any, index: int) -> Node:
    match value:
        case {"op": str(op), "name": str(name), "target": str(target)}:
            args, kwargs = value.get("args", []), value.get("kwargs", {})
            if _NODE_NAME.fullmatch(name) and isinstance(args, list) and isinstance(kwargs, dict):
                return Node(op, name, target, tuple(args), kwargs)
    raise InvalidField(f"graph.nodes[{index}]: must have op, name, target, args and kwargs")


def _check_names(nodes: Sequence[Node]) -> None:
    known: set[str] = set()
    for node in nodes:
        for name in _references([*node.args, *node.kwargs.values()], MAX_DEPTH):
            if name not in known:
                raise InvalidField(f"graph.nodes: {node.name} refers to {name!r}, not before it")
        if node.name in known:
            raise InvalidField(f"graph.nodes: {node.name!r} is there twice")
        known.add(node.name)


def _references(value: Any, depth: int) -> Iterator[str]:
    """The nodes that an argument refers to, once it has a form that is allowed."""
    if depth == 0:
        raise InvalidField(f"graph.nodes: an argument is nested more than {MAX_DEPTH} deep")
    match value:
        case None | bool() | int() | float() | str():
            return
        case list() | {"tuple": list()} | {"slice": [_, _, _]}:
            parts = value if isinstance(value, list) else next(iter(value.values()))
        case {"dict": dict(parts_by_key)}:
            parts = list(parts_by_key.values())
        case {"ref": str(name)}:
            yield name
            return
        case {"float": "inf" | "-inf" | "nan"} | {"ellipsis": True}:
            return
        case {"dtype": str(dtype)} if dtype in DTYPES:
            return
        case _:
            raise InvalidField(f"graph.nodes: argument {str(value)[:80]} is not allowed")
    for part in parts:
        yield from _references(part, depth - 1)


def _check_call(node: Node) -> None:
    if in_place := _IN_PLACE & node.kwargs.keys():
        raise InvalidField(f"graph.nodes: {node.name}: {min(in_place)} is not allowed")
    match node.op:
        case "call_function" if node.target.removeprefix("builtins.") in FUNCTIONS:
            attribute = str(node.args[1]) if len(node.args) == 2 else ""
            if not node.target.endswith("getattr") or attribute in ATTRIBUTES:
                return
            raise InvalidField(f"graph.nodes: {node.name}: attribute {attribute!r} is not allowed")
        case "call_method" if node.target in METHODS:
            return
    raise InvalidField(f"graph.nodes: {node.name}: {node.op} of {node.target!r} is not allowed")


def _parse_output(node: Node) -> tuple[str, dict[str, str]]:
    pair = node.args[0] if node.op == "output" and len(node.args) == 1 else None
    if isinstance(pair, dict):
        pair = pair.get("tuple")
    match pair:
        case [{"ref": str(loss)}, {"dict": dict(metrics)}]:
            for name, value in metrics.items():
                if not (_METRIC.fullmatch(name) and isinstance(value, dict) and "ref" in value):
                    raise InvalidField(f"graph.nodes: metric {name!r} is not custom/name:sum|mean")
            return loss, {name: value["ref"] for name, value in metrics.items()}
    raise InvalidField("graph.nodes: the last must be the output, a loss and its metrics")
