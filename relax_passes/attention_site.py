"""What the recogniser says about one attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from relax_passes.mask import Mask


@dataclass(frozen=True)
class Operand:
    """q, k, v or the result: a tensor and which of its axes are batch, heads, tokens, head
    elements.

    Axes of length 1 that mean nothing are in none of them; ``batch`` is None where there is no
    axis.
    """

    tensor: Any
    batch: int | None
    head: int
    token: int
    dim: int
    heads: int
    head_dim: int

    @property
    def layout(self) -> str:
        """``"BHSD"``-like text: the order of the axes."""
        axes = {self.head: "H", self.token: "S", self.dim: "D"}
        if self.batch is not None:
            axes[self.batch] = "B"
        return "".join(axes[n] for n in sorted(axes))


@dataclass
class AttentionSite:
    """``out = softmax(soft_cap(scale * q kT), masked) v`` found in a graph.

    ``reason`` is empty when q, k, v, scale and mask are all proven; else it says what is not, and
    the other fields hold what was found up to there.
    """

    name: str
    form: str
    anchor: Any
    reason: str = ""
    q: Operand | None = None
    k: Operand | None = None
    v: Operand | None = None
    out: Operand | None = None
    scale: float = 1.0
    soft_cap: float = 0.0
    biases: int = 0
    mask: Mask = field(default_factory=Mask)
    dtype: str = ""
    query_length: Any = None
    key_length: Any = None

    @property
    def recognised(self) -> bool:
        return not self.reason

    @property
    def variant(self) -> str:
        parts = ["softmax"]
        if self.soft_cap:
            parts.append(f"soft-cap({self.soft_cap:g})")
        if self.biases:
            parts.append("bias")
        return "+".join(parts)

    def refuse(self, reason: str) -> AttentionSite:
        self.reason = self.reason or reason
        return self
