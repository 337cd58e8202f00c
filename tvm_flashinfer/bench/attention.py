"""Suite ``attention``: one layer on a CPU beside PyTorch, onnxruntime and TVM's own kernels.

32 query heads on 8 key/value heads of 128, keys and values in pages of 16 whose order is shuffled,
unless the case says otherwise. Decoding is measured in bytes of keys and values a second, its floor
being a plain read of the same bytes; prefill and prefixes that are read once for many queries in
FLOP a second (two products, of visible pairs only), their floor being PyTorch's matrix product in
the same dtype. Peers without paged attention get the same keys and values as contiguous tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..attention import BatchAttention
from ..layout import BlockSparseLayout, PrefixLevel
from ..variant import Variant
from ..variants import soft_cap_window
from .report import Row
from .suites import Context
from .timing import REST, Call, measure

__all__ = ["CASES", "Case", "run"]

SUITE = "attention"
QO_HEADS, KV_HEADS, DIM = 32, 8, 128
POOL_SLACK = 1.05
#: Keys and values, each request's apart, that peers still get: they are copied twice.
CONTIGUOUS_BYTES = 1 << 31
#: Work that TVM's kernels, of a GFLOP/s or so, are still measured on.
TIR_FLOPS = 2e10


@dataclasses.dataclass(frozen=True)
class Case:
    """Requests of one batch.

    Attributes
    ----------
    queries, keys : tuples of int
        Of each request; the last query stands on the last key.
    prefix : int
        Leading keys that all requests share; above 0 the composable format is compared with a flat
        one.
    variant : Variant, optional
        Compared with the plain causal kernel, which should see the same keys.
    """

    name: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    dtype: str = "float32"
    page_size: int = 16
    prefix: int = 0
    variant: Variant | None = None
    params: tuple[tuple[str, float], ...] = ()

    @property
    def is_decode(self) -> bool:
        return max(self.queries) == 1

    @property
    def reads(self) -> bool:
        """Whether reading keys and values is what it can't be faster than."""
        return self.is_decode and not self.prefix

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * sum(self.keys) * KV_HEADS * DIM * self.itemsize

    @property
    def flops(self) -> float:
        """Of both products over the pairs a causal mask leaves."""
        pairs = sum(n * m - n * (n - 1) // 2 for n, m in zip(self.queries, self.keys, strict=True))
        return 4.0 * pairs * QO_HEADS * DIM


def _zipf_lengths() -> tuple[int, ...]:
    """One request of 32,768 keys, and lengths that fall off as 1/n: as many as 8 x 4096."""
    return (32768, *(max(16, 32768 // (8 * n)) for n in range(1, 8)))


def _cases() -> Iterator[Case]:
    for dtype in ("float32", "float16", "bfloat16"):
        yield Case(f"decode {dtype} 8x4096", (1,) * 8, (4096,) * 8, dtype)
    yield Case("decode float32 1x4096", (1,), (4096,))
    yield Case("decode float32 zipf", (1,) * 8, _zipf_lengths())
    yield Case("decode float32 8x4096 page 1", (1,) * 8, (4096,) * 8, page_size=1)
    for dtype in ("float32", "bfloat16"):
        yield Case(f"prefill {dtype} 1x2048", (2048,), (2048,), dtype)
        yield Case(f"prefill {dtype} 4x512", (512,) * 4, (512,) * 4, dtype)
        yield Case(f"append {dtype} 4x(128 on 4096)", (128,) * 4, (4224,) * 4, dtype)
    yield Case("prefill float32 1x2048 page 1", (2048,), (2048,), page_size=1)
    for dtype in ("float32", "bfloat16"):
        for prefix in (4096, 32768):
            keys = (prefix + 128,) * 16
            yield Case(f"prefix {dtype} {prefix}, 16x128", (1,) * 16, keys, dtype, prefix=prefix)
    yield Case(
        "variant float32 1x2048 soft-cap and window",
        (2048,),
        (2048,),
        variant=soft_cap_window,
        params=(("window_left", 2048), ("cap", 50.0)),
    )


CASES = tuple(_cases())


def run(context: Context, cases: tuple[Case, ...] = CASES) -> None:
    """Adds the rows of this suite to ``context.report``."""
    wanted = [case for case in cases if context.wants(case.name)]
    if context.device != "cpu":
        context.report.skipped[SUITE] = f"it measures the cpu, not {context.device}"
        return
    if not wanted:
        return
    if not context.has_packages(SUITE, "torch"):
        return
    import torch

    torch.set_num_threads(context.threads)
    for case in wanted:
        context.progress(case.name)
        context.report.rows.append(_row(context, case))


def _row(context: Context, case: Case) -> Row:
    batch = Batch(case)
    contenders: dict[str, Call] = {"ours": batch.ours()}
    if case.prefix:
        contenders["ours, flat"] = batch.ours(flat=True)
    if case.variant is not None:
        contenders["ours, plain"] = batch.ours(plain=True)
    else:
        contenders |= dict(_torch(context, batch))
        contenders |= dict(_onnxruntime(context, batch))
        contenders |= dict(_tir(context, batch))
    if case.reads:
        contenders["floor"] = batch.read()
        seconds, samples = measure(contenders, REST)
        work, unit, floor_rate = case.kv_bytes / 1e9, "GB/s", case.kv_bytes / 1e9
    else:
        contenders["floor"] = _product(case.dtype)
        seconds, samples = measure(contenders, REST)
        work, unit, floor_rate = case.flops / 1e9, "GFLOP/s", 2 * PRODUCT**3 / 1e9
    return Row(
        suite=SUITE,
        case=case.name,
        metric="keys and values read" if case.reads else "products computed",
        unit=unit,
        better="higher",
        ours=work / seconds.pop("ours"),
        floor=floor_rate / seconds.pop("floor"),
        peers={name: work / value for name, value in seconds.items()},
        samples=samples,
    )


PRODUCT = 2048


@functools.cache
def _product(dtype: str) -> Call:
    import torch

    a = torch.ones((PRODUCT, PRODUCT), dtype=getattr(torch, dtype))
    b = torch.ones_like(a)
    return lambda turn: torch.matmul(a, b)


class Batch:
    """The tensors of a case: pools with shuffled pages, and the same as contiguous tensors."""

    def __init__(self, case: Case) -> None:
        import torch

        self.case = case
        rng = np.random.default_rng(0)
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def random(*shape: int) -> Any:
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

        self.q = random(sum(case.queries), QO_HEADS, DIM)
        self.out = torch.empty_like(self.q)
        page = case.page_size
        prefix_pages = case.prefix // page
        own = [-(-(keys - case.prefix) // page) for keys in case.keys]
        total = prefix_pages + sum(own)
        pool_pages = int(total * POOL_SLACK) + 1
        ids = rng.permutation(pool_pages)[:total]
        self.pool = _in_huge_pages(random(pool_pages, 2, KV_HEADS, page, DIM))
        starts = np.concatenate([[0], np.cumsum(own)]) + prefix_pages
        self.pages = [
            np.concatenate([ids[:prefix_pages], ids[starts[r] : starts[r + 1]]])
            for r in range(len(case.keys))
        ]

    @functools.cached_property
    def contiguous(self) -> list[tuple[Any, Any]]:
        """Keys and values of each request, [1, KV heads, keys, dim]."""
        made = []
        for pages, keys in zip(self.pages, self.case.keys, strict=True):
            both = self.pool[pages]  # [pages, 2, heads, page, dim]
            both = both.permute(1, 2, 0, 3, 4).reshape(2, 1, KV_HEADS, -1, DIM)[:, :, :, :keys]
            made.append((both[0].contiguous(), both[1].contiguous()))
        return made

    def layout(self, *, flat: bool) -> BlockSparseLayout:
        case, page = self.case, self.case.page_size
        qo_indptr = np.concatenate([[0], np.cumsum(case.queries)])

        def level(tables: list[Any], lengths: list[int], rows: list[int]) -> PrefixLevel:
            counts = [len(table) for table in tables]
            last = [n - (c - 1) * page if n else 0 for n, c in zip(lengths, counts, strict=True)]
            indptr = np.concatenate([[0], np.cumsum(counts)])
            return PrefixLevel(rows, indptr, np.concatenate(tables), last)

        requests = list(range(len(case.keys) + 1))
        if flat or not case.prefix:
            levels = [level(self.pages, list(case.keys), requests)]
        else:
            shared = case.prefix // page
            levels = [
                level([self.pages[0][:shared]], [case.prefix], [0, len(case.keys)]),
                level(
                    [pages[shared:] for pages in self.pages],
                    [keys - case.prefix for keys in case.keys],
                    requests,
                ),
            ]
        return BlockSparseLayout.shared_prefix(qo_indptr, levels, page)

    def ours(self, *, flat: bool = False, plain: bool = False) -> Call:
        case = self.case
        layout = self.layout(flat=flat)
        attention = BatchAttention(
            QO_HEADS,
            KV_HEADS,
            DIM,
            dtype=case.dtype,
            variant=None if plain else case.variant,
            kv_layout="HND",
            max_requests=len(case.keys),
            max_q_tokens=sum(case.queries),
            max_kv_pages=layout.num_pages,
            max_levels=len(layout.levels),
        )
        attention.plan(layout)
        params = None if plain else dict(case.params) or None
        return lambda turn: attention.run(self.q, self.pool, params=params, out=self.out)

    def read(self) -> Call:
        """Reads as many bytes of the pool as the case must, on PyTorch's threads."""
        import torch

        flat = self.pool.view(-1)[: self.case.kv_bytes // self.case.itemsize].view(torch.int32)
        return lambda turn: flat.max()


def _in_huge_pages(tensor: Any) -> Any:
    """A copy in memory of 2 MiB pages where the system has some, as the KV cache's own pools."""
    import torch

    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def _torch(context: Context, batch: Batch) -> Iterator[tuple[str, Call]]:
    """Scaled dot-product attention, a call per request (one for requests of one length)."""
    import torch

    case = batch.case
    if case.kv_bytes > CONTIGUOUS_BYTES:
        context.report.skipped[f"torch at {case.name}"] = "it needs every request's own keys"
        return
    attend = torch.nn.functional.scaled_dot_product_attention
    starts = np.concatenate([[0], np.cumsum(case.queries)])
    same = len(set(zip(case.queries, case.keys, strict=True))) == 1
    if same:
        k, v = (torch.cat([pair[i] for pair in batch.contiguous]) for i in range(2))
        groups = [(batch.q.view(len(case.queries), -1, QO_HEADS, DIM).transpose(1, 2), k, v)]
    else:
        groups = [
            (batch.q[starts[r] : starts[r + 1]].transpose(0, 1)[None], k, v)
            for r, (k, v) in enumerate(batch.contiguous)
        ]
    causal = not case.is_decode
    masks = [_append_mask(q.shape[2], k.shape[2]) for q, k, _ in groups]

    def gqa(turn: int) -> None:
        for (q, k, v), mask in zip(groups, masks, strict=True):
            attend(q, k, v, mask, is_causal=causal and mask is None, enable_gqa=True)

    yield "torch, enable_gqa", gqa
    group = QO_HEADS // KV_HEADS
    if case.is_decode:

        def folded(turn: int) -> None:
            for q, k, v in groups:
                attend(q.reshape(q.shape[0], KV_HEADS, group, DIM), k, v)

        yield "torch, group as rows", folded


def _append_mask(queries: int, keys: int) -> Any:
    """Bottom-right causal, which SDPA's own flag isn't, as a mask; None where it isn't needed."""
    import torch

    if queries in (1, keys):
        return None
    return torch.ones((queries, keys), dtype=torch.bool).tril(keys - queries)


def _onnxruntime(context: Context, batch: Batch) -> Iterator[tuple[str, Call]]:
    """The contrib operator GroupQueryAttention over a cache in place: one new key, or all of them.

    It takes one length for a whole batch, and no chunk of several queries on earlier keys.
    """
    case = batch.case
    same = len(set(zip(case.queries, case.keys, strict=True))) == 1
    if not same or case.queries[0] not in (1, case.keys[0]) or case.dtype == "bfloat16":
        return
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
        context.report.skipped["onnxruntime"] = "not installed: pip install onnx onnxruntime"
        return
    import onnx
    import onnxruntime
    import torch

    kind = onnx.TensorProto.FLOAT if case.dtype == "float32" else onnx.TensorProto.FLOAT16
    b, queries, keys = len(case.keys), case.queries[0], case.keys[0]
    past = [torch.cat([pair[i][:, :, :-queries] for pair in batch.contiguous]) for i in range(2)]
    new = [
        torch.cat([pair[i][:, :, -queries:] for pair in batch.contiguous])
        .transpose(1, 2)
        .reshape(b, queries, KV_HEADS * DIM)
        for i in range(2)
    ]
    tensors = {
        "query": batch.q.reshape(b, queries, QO_HEADS * DIM).numpy(),
        "key": new[0].contiguous().numpy(),
        "value": new[1].contiguous().numpy(),
        # A buffer with room for the new tokens: the operator writes them in place.
        "past_key": torch.nn.functional.pad(past[0], (0, 0, 0, queries)).numpy(),
        "past_value": torch.nn.functional.pad(past[1], (0, 0, 0, queries)).numpy(),
        "seqlens_k": np.full((b, 1), keys - 1, np.int32),
        "total_sequence_length": np.array([keys], np.int32),
    }
    outputs = {
        "output": tensors["query"].shape,
        "present_key": tensors["past_key"].shape,
        "present_value": tensors["past_value"].shape,
    }
    helper = onnx.helper
    node = helper.make_node(
        "GroupQueryAttention",
        list(tensors),
        list(outputs),
        domain="com.microsoft",
        num_heads=QO_HEADS,
        kv_num_heads=KV_HEADS,
    )
    graph = helper.make_graph(
        [node],
        "gqa",
        [
            helper.make_tensor_value_info(
                name, onnx.TensorProto.INT32 if value.dtype == np.int32 else kind, value.shape
            )
            for name, value in tensors.items()
        ],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
    )
    opset = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = context.threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in tensors.items()
    }
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    binding.bind_ortvalue_output("present_key", values["past_key"])
    binding.bind_ortvalue_output("present_value", values["past_value"])
    yield "onnxruntime", lambda turn: session.run_with_iobinding(binding)


def _tir(context: Context, batch: Batch) -> Iterator[tuple[str, Call]]:
    """TVM's own paged kernels for the CPU, on the same pool and page table."""
    case = batch.case
    if case.prefix or case.dtype == "bfloat16":
        return
    if not case.is_decode and case.flops > TIR_FLOPS:
        context.report.skipped[f"tvm-tir at {case.name}"] = "it takes minutes"
        return
    import tvm
    from tvm.relax.frontend.nn.llm import _decode_kernels, _prefill_kernels

    heads: tuple[Any, ...] = (KV_HEADS, QO_HEADS, DIM, case.dtype, False, {}, case.page_size)
    if case.is_decode:
        function = _decode_kernels._attention_decode_cpu(*heads)
    else:
        function = _prefill_kernels._attention_prefill_cpu(*heads)
    target = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
    kernel = tvm.compile(tvm.IRModule({"main": function}), target=target)["main"]

    def tensor(values: Any) -> Any:
        return tvm.runtime.tensor(np.asarray(values, np.int32))

    requests = len(case.keys)
    indptr = np.concatenate([[0], np.cumsum([len(pages) for pages in batch.pages])])
    last = [k - (len(p) - 1) * case.page_size for k, p in zip(case.keys, batch.pages, strict=True)]
    position = np.concatenate(
        [np.arange(m - n, m) for n, m in zip(case.queries, case.keys, strict=True)]
    )
    table = [
        tensor(indptr),
        tensor(np.concatenate(batch.pages)),
        tensor(last),
        tensor(np.zeros(requests)),
        tensor(position),
    ]
    q, pool = (tvm.runtime.from_dlpack(x) for x in (batch.q, batch.pool))
    out = tvm.runtime.empty(tuple(batch.q.shape), case.dtype)
    lse = tvm.runtime.empty((batch.q.shape[0], QO_HEADS), "float32")
    scalars = (0, 1.0, 1e4, DIM**-0.5)
    if case.is_decode:
        yield "tvm-tir", lambda turn: kernel(q, pool, *table, out, lse, *scalars)
        return
    starts = tensor(np.concatenate([[0], np.cumsum(case.queries)]))
    yield "tvm-tir", lambda turn: kernel(q, starts, pool, *table, out, lse, 1, *scalars)
