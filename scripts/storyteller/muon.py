"""Muon: momentum whose update is made orthogonal before it is applied.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
``torch.optim.Muon`` does the same arithmetic in bfloat16, which most CPUs emulate; here it is
float32, and matrices of one shape are done together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd quintic that pushes every singular value towards 1; from the paper."""
_UPDATE_RMS = 0.2
"""Root mean square of an update's entries, as AdamW's typically is, so rates carry over."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values end between 0.7 and 1.2.

    Args:
        matrices: ``[count, rows, columns]`` float32.

    Returns:
        The same shape.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for matrices only.

    Args:
        matrices: parameters ``[rows, columns]``.
        lr: learning rate, on AdamW's scale.
        momentum: how much of the old direction is kept.
        weight_decay: pull towards zero, times the learning rate.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for shape, matrices in alike.items():
                directions = [self._direction(matrix, group["momentum"]) for matrix in matrices]
                size = group["lr"] * _UPDATE_RMS * max(shape) ** 0.5
                for matrix, update in zip(
                    matrices, orthogonalize(torch.stack(directions)), strict=True
                ):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-size)

    def _direction(self, matrix: torch.nn.Parameter, momentum: float) -> Tensor:
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["average"] = torch.zeros_like(matrix)
        state["average"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["average"], momentum)
