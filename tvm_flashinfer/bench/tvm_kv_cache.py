"""TVM's own KV cache over its TIR kernels for the CPU: the peer of suite ``kv-cache``."""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
import tvm_ffi

from ..kv_cache import KVCache

__all__ = ["TVMKVCache"]

_PAGE_SIZE = 16
_ROPE_NONE = 0
_MHA = 0


class TVMKVCache(KVCache):
    """``vm.builtin.paged_attention_kv_cache_create``, driven as ours is; pages of 16, no rotation.

    Attributes
    ----------
    filling : bool
        While set, its prefill kernels do nothing: keys and values are stored, attention is not
        computed. TVM can't store them otherwise, and computes a thousandth of what the CPU could.
    """

    def __init__(
        self,
        *,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_batch_size: int,
        max_total_seq_len: int,
        prefill_chunk_size: int,
        num_layers: int = 1,
        dtype: str = "float32",
    ) -> None:
        self.filling = False
        kernels = _compile(num_qo_heads, num_kv_heads, head_dim, dtype)

        def function(name: str) -> list[Any]:
            return ["tirx", kernels[name]]

        def refuse(*args: Any) -> None:
            raise NotImplementedError("steps of this peer have no trees, and are not inspected")

        unused = tvm_ffi.convert(refuse)

        def prefill(name: str) -> list[Any]:
            kernel = kernels[name]

            def call(*args: Any) -> None:
                if not self.filling:
                    kernel(*args)

            return ["tirx", tvm_ffi.convert(call)]

        bounds = (max_batch_size, max_total_seq_len, prefill_chunk_size, _PAGE_SIZE, 0)
        create = tvm.get_global_func("vm.builtin.paged_attention_kv_cache_create")
        super().__init__(
            create(
                tvm_ffi.Shape(bounds),
                tvm_ffi.Shape((0, num_layers)),
                num_qo_heads,
                num_kv_heads,
                head_dim,
                head_dim,
                tvm_ffi.Shape([_MHA] * num_layers),
                False,
                _ROPE_NONE,
                1.0,
                1e4,
                0,
                tvm.runtime.empty((), dtype),
                kernels["append"],
                None,
                prefill("prefill_ragged"),
                prefill("prefill"),
                function("decode"),
                prefill("prefill"),
                function("decode"),
                ["tirx", unused],
                ["tirx", unused],
                [],
                [kernels["merge"]],
                kernels["split"],
                kernels["copy_page"],
                unused,
                unused,
            )
        )


@cache
def _compile(qo_heads: int, kv_heads: int, dim: int, dtype: str) -> Any:
    """The functions that TVM's cache is made of, as its frontend makes them for a CPU."""
    from tvm.relax.frontend.nn.llm import kv_cache as llm

    scaling: dict[str, Any] = {}
    heads = (kv_heads, qo_heads, dim, dtype)
    functions = {
        "append": llm._kv_cache_transpose_append(kv_heads, dim, dtype),
        "prefill_ragged": llm._attention_prefill_ragged_cpu(
            kv_heads, qo_heads, dim, dim, dtype, scaling
        ),
        "prefill": llm._attention_prefill_cpu(*heads, False, scaling),
        "decode": llm._attention_decode_cpu(*heads, False, scaling),
        "merge": llm._merge_state_inplace_cpu(dtype),
        "split": llm.llama_rope_with_position_map(
            1e4, 1.0, dim, qo_heads, kv_heads, dtype, scaling, dim
        ),
        "copy_page": llm._copy_single_page_cpu(kv_heads, _PAGE_SIZE, dim, dtype),
    }
    module = tvm.IRModule(
        {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    )
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    return tvm.compile(module, target=target)
