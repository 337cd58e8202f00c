"""What the recogniser says about one attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from relax_passes.logits import Logits
from relax_passes.mask import Mask
from relax_passes.views import StridedView


@dataclass
class AttentionSite:
    """``out = softmax(f(scale * q kT)) v`` found in a graph.

    ``reason`` is empty when q, k, v and f are all proven; else it says what is not, and the other
    fields hold what was found up to there.  ``views`` are q, k and v, read with strides from the
    tensors that the model's projections made, and ``scale`` is what multiplies their products.
    ``frame`` has the index variables that ``logits`` and ``mask`` are formulas over.  ``product``
    is the result, ``out_index`` the index in it by (batch, head, query, element).  ``rope`` says
    whether a KV cache rotates queries and keys ("fused"), or why the graph does.
    """

    name: str
    form: str
    anchor: Any
    reason: str = ""
    scale: float = 1.0
    soft_cap: float = 0.0
    biases: int = 0
    mask: Mask = field(default_factory=Mask)
    dtype: str = ""
    query_length: Any = None
    key_length: Any = None
    batch: Any = 1
    frame: Any = None
    logits: Logits | None = None
    views: tuple[StridedView, StridedView, StridedView] | None = None
    product: Any = None
    out_index: tuple[Any, ...] = ()
    out_element: Any = None
    names: tuple[str, ...] = ()
    rope: str = ""

    @property
    def recognised(self) -> bool:
        return not self.reason

    @property
    def operands(self) -> tuple[StridedView, StridedView, StridedView]:
        """``views`` of a site that is recognised."""
        assert self.views is not None
        return self.views

    @property
    def variant(self) -> str:
        return "+".join(("softmax", *self.names))

    @property
    def num_qo_heads(self) -> int:
        return self.views[0].heads if self.views else 0

    @property
    def num_kv_heads(self) -> int:
        return self.views[1].heads if self.views else 0

    @property
    def head_dim(self) -> int:
        return self.views[0].dim if self.views else 0

    def refuse(self, reason: str) -> AttentionSite:
        self.reason = self.reason or reason
        return self
