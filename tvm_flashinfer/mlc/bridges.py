"""What mlc_llm main needs of a TVM that the public wheel isn't: one entry for each upstream change.

mlc_llm follows TVM's main branch with a delay of its own, so some names it uses have gone from the
wheel, or its C++ library isn't there. Each :class:`Bridge` names the change, tells whether this
TVM needs it, and makes up for it in the running process. A TVM or an mlc_llm that has caught up
needs none, and none is applied then. No file on disk is changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["BRIDGES", "LATE_BRIDGES", "Bridge", "active", "apply", "apply_late", "library_file"]


@dataclass(frozen=True)
class Bridge:
    """One upstream change.

    Attributes
    ----------
    name : str
        What mlc_llm uses.
    change : str
        What became of it upstream, as a clause, with the pull request where there was one.
    needed : callable
        Whether it is missing here.
    apply : callable
        Makes up for it.
    """

    name: str
    change: str
    needed: Callable[[], bool]
    apply: Callable[[], None]


_active: list[Bridge] = []


def active() -> list[Bridge]:
    """The bridges that were applied in this process, in order."""
    return list(_active)


def apply() -> None:
    """Apply what is needed and wasn't applied yet; mlc_llm must be on the path, not imported."""
    _apply(BRIDGES)


def apply_late() -> None:
    """Apply what needs mlc_llm imported."""
    _apply(LATE_BRIDGES)


def _apply(bridges: tuple[Bridge, ...]) -> None:
    for bridge in bridges:
        if bridge not in _active and bridge.needed():
            bridge.apply()
            _active.append(bridge)


def _lacks(module: str, name: str) -> bool:
    """Whether ``module`` has no attribute ``name``, which may be one of a class."""
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return True
    for part in name.split("."):
        if not hasattr(found, part):
            return True
        found = getattr(found, part)
    return False


def _is_tvm(version: str) -> bool:
    return str(importlib.import_module("tvm").__version__).startswith(f"{version}.")


# -- names of expressions


def _name_hint() -> None:
    from tvm.ir import Var

    Var.name_hint = property(lambda self: self.name)


def _alias(name: str, isinstance_: Callable[[Any], bool], call: Callable[..., Any]) -> type:
    """A class in name: what its instances are, and what calling it makes."""

    class Meta(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance_(instance)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

    return Meta(name, (), {"__module__": __name__})


def _relax_constant() -> None:
    from tvm import relax
    from tvm.ir import GenericConst
    from tvm.runtime import Tensor

    def is_constant(e: Any) -> bool:
        return isinstance(e, GenericConst) and isinstance(e.value, Tensor)

    relax.Constant = _alias("Constant", is_constant, lambda data, *_: relax.const(data))
    GenericConst.data = property(lambda self: self.value)


def _relax_string() -> None:
    from tvm import relax
    from tvm.ir import StringImm

    relax.StringImm = StringImm


def _relax_dtype() -> None:
    import tvm
    from tvm import relax
    from tvm.ir import GenericConst

    def is_dtype(e: Any) -> bool:
        return isinstance(e, GenericConst) and isinstance(e.value, tvm.DataType)

    def make(dtype: Any, *_: Any) -> Any:
        return GenericConst(tvm.DataType(dtype), relax.AnyType())

    relax.DataTypeImm = _alias("DataTypeImm", is_dtype, make)


# -- scheduled TIR


def _sblock() -> None:
    from tvm import s_tir, tirx

    tirx.SBlock, tirx.SBlockRealize = s_tir.SBlock, s_tir.SBlockRealize


def _prim_func_buffers() -> None:
    from tvm import tirx

    def buffer_map(func: Any) -> dict[Any, Any]:
        return {param: param for param in func.params if tirx.is_buffer_var(param)}

    tirx.PrimFunc.buffer_map = property(buffer_map)


def _stmt_functor() -> None:
    import tvm_ffi
    from tvm import tirx
    from tvm.ir import Var

    def substitute(node: Any, replacements: Mapping[Any, Any]) -> Any:
        return tvm_ffi.structural_map(node, (Var, lambda var: replacements.get(var, var)))

    def post_order_visit(node: Any, visit: Callable[[Any], None]) -> None:
        def callback(value: Any) -> None:
            visit(value)

        tvm_ffi.structural_walk(node, callback)

    module = ModuleType("tvm.tirx.stmt_functor")
    module.substitute = substitute  # type: ignore[attr-defined]
    module.post_order_visit = post_order_visit  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    tirx.stmt_functor = module


def _scalars_before_outputs() -> None:
    import tvm
    from tvm import tirx
    from tvm.relax.frontend import nn
    from tvm.relax.frontend.nn import op

    theirs = op.tensor_ir_op

    def tensor_ir_op(func: Any, name_hint: str, args: Any, out: Any) -> Any:
        params = list(func.params)
        scalars = [param for param in params if not tirx.is_buffer_var(param)]
        if scalars and params[-len(scalars) :] == scalars:
            outputs = 1 if not isinstance(out, tuple | list) else len(out)
            inputs = len(params) - len(scalars) - outputs
            body, given = func.body, [a for a in args if tvm.ir.is_prim_expr(a)]
            # Scalars were converted on the way; now each has the dtype that it is given.
            for i, (scalar, value) in enumerate(zip(scalars, given, strict=False)):
                if scalar.ty.dtype != value.ty.dtype:
                    scalars[i] = tirx.Var(scalar.name, value.ty.dtype)
                    cast = tirx.Cast(scalar.ty.dtype, scalars[i])
                    body = tirx.stmt_functor.substitute(body, {scalar: cast})
            order = params[:inputs] + scalars + params[inputs : inputs + outputs]
            func = tirx.PrimFunc(order, body, func.ret_type, func.attrs)
        return theirs(func, name_hint, args, out)

    nn.tensor_ir_op = op.tensor_ir_op = tensor_ir_op


def _disco() -> None:
    import tvm.runtime
    import tvm_ffi

    # Before mlc_llm, which registers a function of its own over one that this module registers.
    tvm.runtime.disco = importlib.import_module("tvm.runtime.disco")
    tvm_ffi.init_ffi_api("runtime.disco", "tvm.runtime.disco._ffi_api")


# -- mlc_llm's own library


def library_file() -> str | None:
    """mlc_llm's C++ library, if it has been built; mlc_llm must be importable."""
    spec = importlib.util.find_spec("mlc_llm")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = os.path.join(spec.submodule_search_locations[0], "libinfo.py")
    libinfo = runpy.run_path(source)
    for name in ("mlc_llm_module", "mlc_llm"):
        if found := libinfo["find_lib_path"](name, optional=True):
            return str(found[0])
    return None


def _skip_library() -> None:
    from tvm_ffi import registry

    # The first is read when mlc_llm is imported; subprocesses inherit it.
    os.environ["SKIP_LOADING_MLCLLM_SO"] = "1"
    registry._SKIP_UNKNOWN_OBJECTS = True


def _lift_global_buffers() -> None:
    from mlc_llm.compiler_pass import lift_global_buffer_alloc as theirs
    from tvm import relax, s_tir, tirx

    def remove_global_buf_alloc(func: Any) -> tuple[Any, list[Any]]:
        root = func.body.block
        lifted = [buffer for buffer in root.alloc_buffers if buffer.scope() == "global"]
        if not lifted:
            return func, []
        params = list(func.params)
        end = 1 + max(i for i, param in enumerate(params) if tirx.is_buffer_var(param))
        block = s_tir.SBlock(
            iter_vars=[],
            reads=[],
            writes=[],
            name_hint="root",
            body=root.body,
            alloc_buffers=[b for b in root.alloc_buffers if b.scope() != "global"],
            annotations=root.annotations,
        )
        body = s_tir.SBlockRealize(iter_values=[], predicate=True, block=block)
        params[end:end] = lifted
        updated = tirx.PrimFunc(params, body, func.ret_type, func.attrs)
        return updated, [relax.TensorType(buffer.shape, buffer.dtype) for buffer in lifted]

    theirs.remove_global_buf_alloc = remove_global_buf_alloc


def _narrow_floats() -> None:
    import tvm
    from mlc_llm.compiler_pass import pipeline
    from tvm import tirx

    def too_narrow(buffers: list[Any]) -> bool:
        dtypes = [str(buffer.dtype) for buffer in buffers]
        # Of float16 they are what multiplies by a matrix of each head, as DeepSeek's decoding.
        by_head = set(dtypes) == {"float16"} and all(len(buffer.shape) == 3 for buffer in buffers)
        return by_head or any(dtype.startswith(("bfloat", "float8")) for dtype in dtypes)

    @tvm.transform.module_pass(opt_level=0, name="LeaveNarrowFloats")
    def leave(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        if tvm.target.Target.current().kind.name != "llvm":
            return mod
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc):
                buffers = [param for param in func.params if tirx.is_buffer_var(param)]
                if too_narrow(buffers):
                    mod[gvar] = func.with_attr("tirx.is_scheduled", True)
        return mod

    theirs = pipeline.LowBatchGemvSpecialize
    pipeline.LowBatchGemvSpecialize = lambda: tvm.transform.Sequential([theirs(), leave])


def _no_cublas() -> None:
    import tvm
    from mlc_llm.compiler_pass import pipeline

    pipeline.BLASDispatch = lambda _target: tvm.transform.Sequential([])


def _lacks_cublas() -> bool:
    import tvm_ffi

    return tvm_ffi.get_global_func("relax.ext.cublas", allow_missing=True) is None


def _center_crop() -> None:
    from mlc_llm.model.vision.image_processing import ImageProcessor
    from tvm import te
    from tvm.relax.frontend.nn import op

    def crop(self: Any, image: Any, crop_size: Mapping[str, int]) -> Any:
        height, width = crop_size["height"], crop_size["width"]

        def compute(x: Any) -> Any:
            top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
            extents = (x.shape[0], x.shape[1], height, width)
            return te.compute(extents, lambda n, c, i, j: x[n, c, i + top, j + left], name="crop")

        return op.tensor_expr_op(compute, "crop", [image])

    ImageProcessor.crop = crop


def _recurrent_state() -> None:
    from mlc_llm.nn.rnn_state import RNNState

    from . import recurrent

    RNNState.create_get_func = staticmethod(recurrent.create_get_func)
    RNNState.create_set_func = staticmethod(recurrent.create_set_func)


#: What ``import mlc_llm`` and its compiler need of TVM.
BRIDGES = (
    Bridge(
        "Var.name_hint",
        "TVM 0.27 calls it Var.name (apache/tvm#20016)",
        lambda: _lacks("tvm.ir", "Var.name_hint"),
        _name_hint,
    ),
    Bridge(
        "relax.Constant",
        "TVM 0.27 has ir.GenericConst, made by relax.const (apache/tvm#20386)",
        lambda: _lacks("tvm.relax", "Constant"),
        _relax_constant,
    ),
    Bridge(
        "relax.StringImm",
        "TVM 0.27 has it in tvm.ir (apache/tvm#20386)",
        lambda: _lacks("tvm.relax", "StringImm"),
        _relax_string,
    ),
    Bridge(
        "relax.DataTypeImm",
        "TVM 0.27 has ir.GenericConst of a dtype (apache/tvm#20386)",
        lambda: _lacks("tvm.relax", "DataTypeImm"),
        _relax_dtype,
    ),
    Bridge(
        "tirx.SBlock",
        "TVM 0.27 has SBlock and SBlockRealize in tvm.s_tir (apache/tvm#20378)",
        lambda: _lacks("tvm.tirx", "SBlock"),
        _sblock,
    ),
    Bridge(
        "PrimFunc.buffer_map",
        "in TVM 0.27 buffers are parameters themselves (apache/tvm#20086)",
        lambda: _lacks("tvm.tirx", "PrimFunc.buffer_map"),
        _prim_func_buffers,
    ),
    Bridge(
        "tirx.stmt_functor",
        "tvm-ffi 0.1.15 has structural_map and structural_walk (apache/tvm#20308, #20317)",
        lambda: _lacks("tvm.tirx", "stmt_functor"),
        _stmt_functor,
    ),
    Bridge(
        "nn.op.tensor_ir_op",
        "in TVM 0.27 scalars are arguments like others, before outputs (apache/tvm#20009); "
        "mlc-ai/mlc-llm#3530 follows",
        lambda: _lacks("tvm.relax", "PrimValue"),
        _scalars_before_outputs,
    ),
    Bridge(
        "runtime.disco",
        "TVM 0.27 looks for Disco before it loads the library that has it (apache/tvm#19594)",
        lambda: _lacks("tvm.runtime", "disco.ThreadedSession"),
        _disco,
    ),
    Bridge(
        "libmlc_llm_module.so",
        "not built: compile and convert_weight work, what runs a model needs it",
        lambda: library_file() is None,
        _skip_library,
    ),
)

#: What changes a module of mlc_llm, and is applied once that is imported.
LATE_BRIDGES = (
    Bridge(
        "remove_global_buf_alloc",
        "its search for pointers finds none: buffers are parameters themselves (apache/tvm#20086)",
        lambda: any(bridge.name == "PrimFunc.buffer_map" for bridge in _active),
        _lift_global_buffers,
    ),
    Bridge(
        "BLASDispatch",
        "the public wheel has no cuBLAS: --opt cublas_gemm=1 is left to our linear layers",
        _lacks_cublas,
        _no_cublas,
    ),
    Bridge(
        "dlight.cpu.GEMV",
        "TVM 0.27 fails at vectors of bfloat16; some of float16 and float8 take it minutes",
        lambda: _is_tvm("0.27"),
        _narrow_floats,
    ),
    Bridge(
        "ImageProcessor.crop",
        "TVM 0.27 wants T.writes at the top of a block, as mlc-ai/mlc-llm#3530 has it",
        lambda: _is_tvm("0.27"),
        _center_crop,
    ),
    Bridge(
        "RNNState.create_get_func",
        "TVM 0.27 finds a block that names its slot inside ill-formed",
        lambda: _is_tvm("0.27"),
        _recurrent_state,
    ),
)
