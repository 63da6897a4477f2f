"""AdamW over one run's flat parameter, with hyperparameters that come with every step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn

from luthier_core.errors import BadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamParams:
    """Hyperparameters of one step; the defaults are the wire protocol's."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    """Decoupled, as in AdamW."""
    grad_clip_norm: float = 0.0
    """Largest global norm of the gradient; 0 or less is no limit."""


class FlatAdamW:
    """torch's AdamW on one 1-D parameter: element by element the same as one tensor at a time.

    `parameter.grad` must be set for good; the moments lie in buffers as long as the parameter.
    """

    def __init__(self, parameter: nn.Parameter, *, applies_nonfinite: bool = False) -> None:
        """With `applies_nonfinite`, a gradient that is not finite is a gradient like any other."""
        self.parameter = parameter
        self._applies_nonfinite = applies_nonfinite
        # One pass over the memory instead of a dozen. On CUDA it wants `step` on the device.
        fused = parameter.device.type == "cpu"
        self._adamw = torch.optim.AdamW([parameter], foreach=False, fused=fused)
        self.reset()

    @property
    def num_steps(self) -> int:
        return int(self._adamw.state[self.parameter]["step"].item())

    @property
    def moments(self) -> Mapping[str, Tensor]:
        """The first and second moment, under torch's names."""
        state = self._adamw.state[self.parameter]
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}

    def reset(self, num_steps: int = 0) -> None:
        """Zero moments, as after `num_steps` steps; a caller that restores fills in the moments."""
        self._adamw.state[self.parameter] = {
            "step": torch.tensor(float(num_steps)),
            "exp_avg": torch.zeros_like(self.parameter),
            "exp_avg_sq": torch.zeros_like(self.parameter),
        }

    def step(self, params: AdamParams) -> dict[str, float]:
        """One update from parameter.grad, which may be clipped in place; the step's metrics.

        Norms are over the whole parameter: `grad_norm` before clipping, `update_norm` of what the
        step, decay included, has added to the weights, `param_norm` of the weights after it.
        BadRequest, with nothing changed, if the norm of the gradient is not finite and not to be
        applied.
        """
        smallest = torch.finfo(self.parameter.dtype).tiny
        if params.eps < smallest:
            # A moment of 0, as A has while B is 0, would make 0 / 0.
            raise BadRequest(f"adam_params.eps: {params.eps}; must be at least {smallest:.2g}")
        gradient = self.parameter.grad
        assert gradient is not None
        norm = _norm(gradient)
        grad_norm = norm.item()
        if not (math.isfinite(grad_norm) or self._applies_nonfinite):
            raise BadRequest(f"gradient norm is not finite ({grad_norm}): no update was made")
        if params.grad_clip_norm > 0:
            nn.utils.clip_grads_with_norm_([self.parameter], params.grad_clip_norm, norm)
        self._adamw.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        before = self.parameter.detach().clone()
        self._adamw.step()
        return {
            "grad_norm": grad_norm,
            "param_norm": _norm(self.parameter.detach()).item(),
            "update_norm": _norm(self.parameter.detach(), before).item(),
            "learning_rate": params.learning_rate,
            "step": float(self.num_steps),
        }


_CHUNK = 1 << 18
"""Numbers that stay in the cache while they are widened: all at once take six times as long."""


def _norm(flat: Tensor, less: Tensor | None = None) -> Tensor:
    """Of flat - less, if given. A float64 scalar: squares of numbers near 1e20 overflow float32."""
    squared = flat.new_zeros((), dtype=torch.float64)
    others = repeat(None) if less is None else torch.split(less, _CHUNK)
    for chunk, other in zip(torch.split(flat, _CHUNK), others, strict=False):
        difference = chunk if other is None else chunk - other
        squared += torch.linalg.vector_norm(difference, dtype=torch.float64).square()
    return squared.sqrt()
