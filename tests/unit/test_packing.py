"""From wire tensors to packed batches."""

import numpy as np
import pytest
import torch

from luthier_core.losses import LOSSES
from luthier_core.proto import wire_pb2
from luthier_trainer.packing import Example, decode_datum, decode_tensor, micro_batches, pack


def example(tokens: list[int], targets: list, weights: list) -> Example:
    return Example(
        tokens=np.array(tokens, np.int64),
        targets=np.array(targets, np.int64),
        loss_inputs={"weights": np.array(weights, np.float32)},
    )


def test_positions_restart_with_every_datum_and_missing_targets_weigh_nothing() -> None:
    one = example([5, 6], [6, 7], [1.0, 0.5])
    two = example([8, 9, 4], [[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [5, 6]])
    batch = pack([one, two], torch.device("cpu"))
    assert batch.tokens_T.tolist() == [5, 6, 8, 9, 4]
    assert batch.positions_T.tolist() == [0, 1, 0, 1, 2]
    assert batch.lengths == [2, 3]
    assert batch.targets_TK.tolist() == [[6, 0], [7, 0], [1, 2], [3, 4], [5, 6]]
    weights_TK = batch.loss_inputs_TK["weights"]
    assert weights_TK.tolist() == [[1, 0], [0.5, 0], [1, 2], [3, 4], [5, 6]]
    assert weights_TK.dtype == torch.float32


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 3, 3], [[3, 3], [3]]),
        ([9, 1, 5], [[9], [1, 5]]),
        ([1, 9, 1], [[1], [9], [1]]),
        ([], []),
    ],
)
def test_micro_batches_keep_order_and_budget_and_never_split_a_datum(
    lengths: list[int], expected: list[list[int]]
) -> None:
    examples = [example([0] * n, [0] * n, [0] * n) for n in lengths]
    groups = [[len(e.tokens) for e in group] for group in micro_batches(examples, 6)]
    assert groups == expected


def test_the_chunks_of_a_datum_are_one_sequence() -> None:
    texts = [np.array(part, "<i4").tobytes() for part in ([1, 2], [3])]
    chunks = [wire_pb2.Chunk(encoded_text=wire_pb2.EncodedTextChunk(tokens=t)) for t in texts]
    targets = wire_pb2.Tensor(
        dense=np.array([2, 3, 4], "<i8").tobytes(), dtype=wire_pb2.DTYPE_INT64
    )
    datum = wire_pb2.Datum(
        model_input=chunks, loss_fn_inputs={"target_tokens": targets, "weights": targets}
    )
    decoded = decode_datum(datum, LOSSES["cross_entropy"], {})
    assert decoded.tokens.tolist() == [1, 2, 3]
    # Weights that a client sent as integers count like any others.
    assert decoded.loss_inputs["weights"].dtype == np.float32
    assert decoded.loss_inputs["weights"].tolist() == [2, 3, 4]


def policy_datum(**floats: list[float]) -> wire_pb2.Datum:
    """Three tokens, of which the first is a prompt's."""
    text = wire_pb2.EncodedTextChunk(tokens=np.array([1, 2, 3], "<i4").tobytes())
    given = {"logprobs": [0.0, -1.0, 0.0], "advantages": [0.0, 0.0, 2.0], **floats}
    inputs = {
        name: wire_pb2.Tensor(dense=np.array(values, "<f4").tobytes(), dtype=wire_pb2.DTYPE_FLOAT32)
        for name, values in given.items()
    }
    targets = wire_pb2.Tensor(
        dense=np.array([2, 3, 4], "<i8").tobytes(), dtype=wire_pb2.DTYPE_INT64
    )
    return wire_pb2.Datum(
        model_input=[wire_pb2.Chunk(encoded_text=text)],
        loss_fn_inputs={"target_tokens": targets, **inputs},
    )


def test_a_setting_holds_at_every_target_unless_the_datum_brings_its_own() -> None:
    config = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    own = policy_datum(clip_high_threshold=[1.0, 2.0, 3.0])
    data = [decode_datum(datum, LOSSES["ppo"], config) for datum in (policy_datum(), own)]
    packed = pack(data, torch.device("cpu"), torch.float64).loss_inputs_TK
    assert packed["clip_low_threshold"][:, 0].tolist() == [0.8] * 6
    assert packed["clip_high_threshold"][:, 0].tolist() == [1.2] * 3 + [1.0, 2.0, 3.0]


def test_the_ratio_of_a_sequence_is_over_what_is_not_padding_unless_masked() -> None:
    default = decode_datum(policy_datum(), LOSSES["gspo"], {})
    masked = decode_datum(policy_datum(sequence_ratio_mask=[1, 0, 1]), LOSSES["gspo"], {})
    assert default.loss_inputs["sequence_ratio_mask"].tolist() == [0, 1, 1]
    assert masked.loss_inputs["sequence_ratio_mask"].tolist() == [1, 0, 1]


def test_a_sparse_tensor_is_zero_where_nothing_was_sent() -> None:
    sparse = wire_pb2.SparseCsr(
        values=np.array([7.5, 8.5, 9.5], "<f4").tobytes(),
        crow_indices=np.array([0, 1, 1, 3], "<i8").tobytes(),
        col_indices=np.array([1, 0, 2], "<i8").tobytes(),
    )
    tensor = wire_pb2.Tensor(sparse_csr=sparse, dtype=wire_pb2.DTYPE_FLOAT32, shape=[3, 3])
    assert decode_tensor(tensor).tolist() == [[0, 7.5, 0], [0, 0, 0], [8.5, 0, 9.5]]


def test_a_dense_tensor_takes_the_shape_it_names() -> None:
    values = np.arange(6, dtype="<i8").tobytes()
    tensor = wire_pb2.Tensor(dense=values, dtype=wire_pb2.DTYPE_INT64, shape=[3, 2])
    assert decode_tensor(tensor).tolist() == [[0, 1], [2, 3], [4, 5]]
