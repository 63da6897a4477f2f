"""Matrix products: x @ w.T of training, which in float32 on a CPU goes through oneDNN.

torch multiplies float32 with MKL, which leaves half of an AMD core idle (measured, 1024 rows: 100
against 230 GFLOP/s). Both accumulate in float32. No gradient: it is for autograd functions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

ROW_MULTIPLE = 4
"""Products of fewer rows take other paths, torch's own or a matrix-vector product: the last bits of
a row would depend on what else is in the batch (measured on CPU, float32)."""


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def product(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ w.T + bias [M, N]; either may be a view of any strides, such as a transposed weight."""
    if not (_HAS_ONEDNN and x_MK.dtype == torch.float32 and x_MK.device.type == "cpu"):
        return F.linear(x_MK, w_NK, bias_N)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, w_NK, bias_N, "none", [], "")
    return out
