"""Mixture-of-experts layers in a form that a graph can hold.

transformers sorts tokens by expert, which needs shapes that depend on values. Here every expert is
computed for every token and weighed by what the router gives it, mostly zero: the same sum, token
by token. It costs ``experts / top_k`` times the arithmetic, and reads every expert's weights.
"""

from __future__ import annotations

from typing import Any

#: Name of :func:`dense_experts` in transformers' registry of expert implementations.
IMPLEMENTATION = "tvm_flashinfer_dense"


def dense_experts(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """A forward of transformers' experts modules (``use_experts_implementation``).

    Parameters
    ----------
    hidden_states : Tensor
        [tokens, hidden].
    top_k_index, top_k_weights : Tensor
        [tokens, top_k]: each token's experts, and what their results are multiplied with.

    Returns
    -------
    [tokens, hidden].
    """
    import torch

    experts = torch.arange(self.num_experts, device=top_k_index.device)
    chosen = top_k_index[:, :, None] == experts[None, None, :]
    weights = (chosen.to(top_k_weights.dtype) * top_k_weights[:, :, None]).sum(1)

    def linear(x: Any, weight: Any, bias: Any) -> Any:
        """x [1 or experts, tokens, in] to [experts, tokens, out]."""
        y = torch.matmul(x, weight if self.is_transposed else weight.transpose(1, 2))
        return y if bias is None else y + bias[:, None, :]

    def bias(name: str) -> Any:
        return getattr(self, f"{name}_bias") if self.has_bias else None

    x = hidden_states[None]
    if self.has_gate:
        x = self._apply_gate(linear(x, self.gate_up_proj, bias("gate_up_proj")))
    else:
        x = self.act_fn(linear(x, self.up_proj, bias("up_proj")))
    x = linear(x, self.down_proj, bias("down_proj"))
    if self.has_post_expert_norm:
        x = self.post_expert_norm(x)
    return (x * weights.transpose(0, 1)[:, :, None]).sum(0).to(hidden_states.dtype)


def use_dense_experts(model: Any) -> None:
    """Make a transformers model compute its experts by :func:`dense_experts`, if it has any."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # a transformers without the registry: its models loop over experts
        return
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, dense_experts)
    for module in model.modules():
        if hasattr(module, "has_gate") and hasattr(module, "_apply_gate"):
            module.config._experts_implementation = IMPLEMENTATION
