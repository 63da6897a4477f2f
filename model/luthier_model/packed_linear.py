"""Frozen linear layers laid out anew for oneDNN: on a CPU about twice as fast as torch's own.

torch multiplies float32 with MKL, which packs the weight again at every call and leaves half of an
AMD core idle (measured, 64 rows: 90 against 200 GFLOP/s). Both accumulate in float32.

For inference only: there is no gradient.
"""

import torch
from torch import Tensor, nn

from luthier_model.base import BaseModel
from luthier_model.lora import MultiLoRALinear


class PackedLinear(nn.Linear):
    """Stands for an nn.Linear whose weight does not change any more."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, input: Tensor) -> Tensor:
        packed = self._packed
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, self.bias, "none", [], "")
        return out


@torch.no_grad()
def pack_linears(model: BaseModel) -> None:
    """Pack the model's linear layers where that is of use: float32 on a CPU with oneDNN.

    The plain weights are let go, but for those that an embedding shares.
    """
    packable = model.device.type == "cpu" and model.dtype == torch.float32
    if not packable or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    shared = model.module.get_input_embeddings().weight
    for part in model.module.modules():
        if isinstance(part, MultiLoRALinear) and isinstance(part.linear, nn.Linear):
            packed = PackedLinear(part.linear)
            if packed.weight is not shared:
                packed.weight = nn.Parameter(packed.weight.new_empty(0), requires_grad=False)
            part.linear = packed
