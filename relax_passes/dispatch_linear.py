"""DispatchLinear: linear layers to ``tvm_flashinfer.linear``, on CUDA to cuBLASLt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator

from relax_passes.graph import (
    Graph,
    dtype_of,
    is_one,
    op_name,
    permutation,
    shape_of,
    static_int,
)
from tvm_flashinfer.linking import link

FUNCTION_NK = "tvm_flashinfer.linear"
FUNCTION_KN = "tvm_flashinfer.linear_kn"
CUDA_FUNCTION_NK = "tvm_flashinfer.linear_cuda"
CUDA_FUNCTION_KN = "tvm_flashinfer.linear_cuda_kn"
DTYPES = ("float32", "float16", "bfloat16")
CPU_DEVICE_TYPE, CUDA_DEVICE_TYPE = 1, 2


class _LeftAloneError(Exception):
    """Why a product is not rewritten."""


@dataclass(frozen=True)
class LinearSite:
    """One matmul of the module: rewritten, or left alone and why.

    ``name`` is the variable of the matmul, ``weight_layout`` is ``"NK"`` (as torch.nn.Linear keeps
    it), ``"KN"`` or ``""`` where no weight was found; ``out_dtype`` is the dtype of the rewritten
    result, a fused cast included.
    """

    function: str
    name: str
    x_shape: str
    weight_shape: str
    weight_layout: str
    dtype: str
    out_dtype: str
    has_bias: bool
    rewritten: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)


@dataclass(frozen=True)
class _Linear:
    """A proven site: ``result = x @ weight^T (+ bias)``, the last variable of the fused chain."""

    result: relax.Var
    x: relax.Expr
    weight: relax.Expr
    layout: str
    bias: relax.Expr | None = None
    on_cuda: bool = False
    row_kernel: str = ""

    @property
    def function(self) -> str:
        if self.row_kernel and _is_row(self):
            return self.row_kernel + ("_bias" if self.bias is not None else "")
        if self.on_cuda:
            return CUDA_FUNCTION_NK if self.layout == "NK" else CUDA_FUNCTION_KN
        return FUNCTION_NK if self.layout == "NK" else FUNCTION_KN


@tvm.transform.module_pass(opt_level=0, name="DispatchLinear")
class DispatchLinear:
    """Send linear layers to ``tvm_flashinfer.linear``, which streams or multiplies at full speed.

    TVM leaves a matmul unscheduled on a CPU, where it then takes most of a decoding step.

    Before::

        wt: R.Tensor((4096, 1024), "float16") = R.permute_dims(w)
        y: R.Tensor((b, s, 1024), "float16") = R.matmul(x, wt)
        z: R.Tensor((b, s, 1024), "float16") = R.add(y, bias)
        out: R.Tensor((b, s, 1024), "float32") = R.astype(z, "float32")

    After::

        out = R.call_dps_packed(
            "tvm_flashinfer.linear", (x, w, bias), out_ty=R.Tensor((b, s, 1024), "float32")
        )

    A matmul is a linear layer if its right-hand operand is a matrix that is a parameter or a
    constant of the function but for layout: ``permute_dims``, ``astype`` to a wider dtype, an
    element of a tuple, an alias, a repetition for each matrix on the left. A weight that is used as
    [K, N], without ``permute_dims``, goes to ``tvm_flashinfer.linear_kn``. Where the function has
    the attribute ``num_input``, its first inputs are no parameters. Only straight-line code is
    rewritten.

    What follows and is read by nobody else is taken along: the addition of a parameter of N
    elements, and casts among float32, float16 and bfloat16. Sums are float32 up to the last cast,
    so a 16-bit result is rounded once where the operators one by one would round it each time.

    Anything else is left as it is. Runs before LegalizeOps. The module's ``external_mods`` get the
    object that loads ``libtvm_flashinfer.so`` with an exported library.

    Parameters
    ----------
    target : tvm.target.Target | None
        What the module is compiled for; the current target by default. Devices other than CPUs and
        CUDA are left alone; on CUDA the functions are ``linear_cuda`` and ``linear_cuda_kn``, which
        take operands of one dtype.
    row_kernel : str
        On CUDA, the function for 16-bit layers whose input is known to be a single row, as in a
        decoding step of one sequence (``tvm_flashinfer.jit_cuda.build_linear_row``).
    report : list[LinearSite] | None
        Gets one entry for each matmul of the module, in order.

    Raises
    ------
    ValueError
        No target is given, and there is no current one.
    """

    def __init__(
        self,
        target: tvm.target.Target | None = None,
        *,
        row_kernel: str = "",
        report: list[LinearSite] | None = None,
    ) -> None:
        self.target = target
        self.row_kernel = row_kernel
        self.report = report

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """See the class."""
        target = self.target or tvm.target.Target.current(allow_none=True)
        if target is None:
            raise ValueError(
                "DispatchLinear has no target: give it one, or apply it inside `with target:`."
            )
        report = self.report if self.report is not None else []
        updated = {}
        for gvar, func in mod.functions_items():
            if not isinstance(func, relax.Function) or _is_library_function(func):
                continue
            linears = [
                replace(linear, row_kernel=self.row_kernel)
                for linear in _find(gvar.name_hint, func, target, report)
            ]
            if linears:
                rewritten = _Rewriter(mod, linears).visit_expr(func)
                updated[gvar] = relax.analysis.remove_all_unused(rewritten)
        if updated:
            mod = mod.clone()
            for gvar, func in updated.items():
                mod.update_func(gvar, func)
            mod = link(mod)
        return mod


def _is_library_function(func: relax.Function) -> bool:
    """Whether another pass has given the function to somebody else."""
    attrs = func.attrs or {}
    return any(name in attrs for name in ("Codegen", "Primitive", "Composite"))


def _find(
    function: str, func: relax.Function, target: tvm.target.Target, report: list[LinearSite]
) -> Iterator[_Linear]:
    """The linear layers of a function; every matmul goes into the report."""
    graph = Graph(func)
    weights = _weight_params(func)
    straight_line = 0
    for binding in graph.bindings:
        call = binding.value
        if op_name(call) != "matmul":
            continue
        straight_line += 1
        site = LinearSite(
            function=function,
            name=str(binding.var.name),
            x_shape=_shape_text(call.args[0]),
            weight_shape=_shape_text(call.args[1]),
            weight_layout="",
            dtype=_dtype_text(call.args[0]),
            out_dtype=_dtype_text(binding.var),
            has_bias=False,
            rewritten=False,
            reason="",
        )
        try:
            linear = _match(graph, weights, binding, target)
            with_epilogue = _with_epilogue(graph, weights, linear)
            if _accepted(with_epilogue):
                linear = with_epilogue
            elif not _accepted(linear):
                raise _LeftAloneError(
                    "cuBLASLt takes x and a weight of one dtype, and gives that or float32"
                )
        except _LeftAloneError as why:
            report.append(replace(site, reason=str(why)))
            continue
        report.append(
            replace(
                site,
                weight_shape=_shape_text(linear.weight),
                weight_layout=linear.layout,
                out_dtype=dtype_of(linear.result),
                has_bias=linear.bias is not None,
                rewritten=True,
            )
        )
        yield linear
    nested = _count_matmuls(func) - straight_line
    for index in range(nested):
        reason = "it is inside a branch or a nested function"
        report.append(
            LinearSite(function, f"nested {index}", "", "", "", "", "", False, False, reason)
        )


def _match(
    graph: Graph, weights: set[Any], binding: relax.VarBinding, target: tvm.target.Target
) -> _Linear:
    """``x @ weight``, or _LeftAloneError."""
    x, right = binding.value.args
    for what, expr in (("left-hand operand", x), ("right-hand operand", right)):
        if not isinstance(expr.ty, relax.TensorType) or expr.ty.dtype is None:
            raise _LeftAloneError(f"the {what} is no tensor of known dtype")
        if dtype_of(expr) not in DTYPES:
            raise _LeftAloneError(f"the {what} is {dtype_of(expr)}, not one of {', '.join(DTYPES)}")
    if dtype_of(binding.var) not in DTYPES:
        raise _LeftAloneError(f"the result is {dtype_of(binding.var)}")
    on_cuda = _on_cuda(binding.var.ty, target)
    x_shape, shape = shape_of(x), shape_of(right)
    if x_shape is None or shape is None:
        raise _LeftAloneError("the dimensions of the operands are not known one by one")
    weight, layout = _one_matrix(graph, right), "KN"
    shape = shape_of(weight) or []
    if len(shape) != 2:
        raise _LeftAloneError(
            f"the right-hand operand has {len(shape)} dimensions, a linear layer's weight has two"
        )
    if not _same_dims(shape_of(binding.var) or [], [*x_shape[:-1], shape[-1]]):
        raise _LeftAloneError("the left-hand operand is repeated for several products")
    while True:
        value = graph.resolve(weight)
        op = op_name(value)
        if op == "permute_dims" and _rank(value.args[0]) == 2:
            if permutation(value, 2) == [1, 0]:
                layout = "NK" if layout == "KN" else "KN"
            weight = value.args[0]
        elif op == "astype" and _widens(value):
            weight = value.args[0]
        else:
            break
    if not _is_weight(graph, weights, weight):
        raise _LeftAloneError(
            "the right-hand operand is computed or an input"
            + (f" (relax.{op})" if op else "")
            + ", no parameter or constant"
        )
    return _Linear(binding.var, x, weight, layout, on_cuda=on_cuda)


def _one_matrix(graph: Graph, matrices: relax.Expr) -> relax.Expr:
    """The matrix that ``matrices``, [.., K, N], repeats, as torch writes a linear layer whose input
    isn't contiguous; otherwise ``matrices`` itself.
    """
    found = matrices
    while (shape := shape_of(found)) and len(shape) > 2:
        value = graph.resolve(found)
        if op_name(value) not in ("broadcast_to", "expand_dims", "reshape"):
            return matrices
        found = value.args[0]
        source = shape_of(found)
        if not source or len(source) < 2 or not _same_dims(source[-2:], shape[-2:]):
            return matrices
        if not all(map(is_one, source[:-2])):
            return matrices
    return found


def _same_dims(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(tvm_ffi.structural_equal, a, b))


def _is_row(linear: _Linear) -> bool:
    """Whether the input is one row, in the layout and dtype of the row kernel."""
    shape = shape_of(linear.x)
    if not linear.on_cuda or not shape or linear.layout != "NK":
        return False
    features = static_int(shape[-1])
    return (
        all(map(is_one, shape[:-1]))
        and features is not None
        and features % 8 == 0
        and dtype_of(linear.x) in ("float16", "bfloat16")
    )


def _accepted(linear: _Linear) -> bool:
    """Whether the function takes these dtypes; the CPU's takes any."""
    if not linear.on_cuda:
        return True
    x, out = dtype_of(linear.x), dtype_of(linear.result)
    bias_fits = linear.bias is None or dtype_of(linear.bias) == out
    return dtype_of(linear.weight) == x and out in (x, "float32") and bias_fits


def _with_epilogue(graph: Graph, weights: set[Any], linear: _Linear) -> _Linear:
    """Take along the bias and the casts that are the only readers of the product.

    The chain's last variable is bound after all the others, so every operand dominates it.
    """
    while True:
        users = graph.users[linear.result]
        if len(users) != 1 or linear.result in graph.outputs:
            return linear
        (user,) = users
        value = graph.value[user]
        op = op_name(value)
        if op == "astype" and dtype_of(user) in DTYPES:
            linear = replace(linear, result=user)
        elif op == "add" and linear.bias is None:
            # One read by one user: it is exactly one of the two operands.
            (bias,) = (arg for arg in value.args if arg != linear.result)
            if not _is_bias(graph, weights, bias, linear.result):
                return linear
            linear = replace(linear, result=user, bias=bias)
        else:
            return linear


def _is_bias(graph: Graph, weights: set[Any], bias: relax.Expr, product: relax.Var) -> bool:
    """Whether it is a parameter of as many elements as the product has features."""
    shape, features = shape_of(bias), shape_of(product)
    if not shape or not features or len(shape) > len(features) or dtype_of(bias) not in DTYPES:
        return False
    same = tvm_ffi.structural_equal(shape[-1], features[-1])
    return same and all(map(is_one, shape[:-1])) and _is_weight(graph, weights, bias)


def _is_weight(graph: Graph, weights: set[Any], expr: relax.Expr) -> bool:
    """Whether it is a parameter of the function, an element of a tuple of such, or a constant."""
    value = graph.resolve(expr)
    while isinstance(value, relax.TupleGetItem):
        value = graph.resolve(value.tuple_value)
    return isinstance(value, GenericConst) or value in weights


def _weight_params(func: relax.Function) -> set[Any]:
    """The inputs of a function, less those that the attribute ``num_input`` calls activations."""
    inputs = int(func.attrs["num_input"]) if func.attrs and "num_input" in func.attrs else 0
    return set(list(func.params)[inputs:])


def _on_cuda(ty: relax.TensorType, target: tvm.target.Target) -> bool:
    where = target if ty.vdevice is None else ty.vdevice.target
    device_type = where.get_target_device_type()
    if device_type not in (CPU_DEVICE_TYPE, CUDA_DEVICE_TYPE):
        raise _LeftAloneError(f"it runs on {where.kind.name}, not on a CPU or CUDA")
    return device_type == CUDA_DEVICE_TYPE


def _widens(cast: relax.Call) -> bool:
    """Whether a cast keeps every value as it is, between dtypes that the kernel reads."""
    source = dtype_of(cast.args[0])
    return source in DTYPES and dtype_of(cast) in (source, "float32")


def _rank(expr: relax.Expr) -> int:
    shape = shape_of(expr)
    return -1 if shape is None else len(shape)


def _shape_text(expr: relax.Expr) -> str:
    shape = shape_of(expr) if isinstance(expr.ty, relax.TensorType) else None
    if shape is None:
        return "?"
    known = (static_int(dim) for dim in shape)
    names = (str(n) if n is not None else str(dim) for n, dim in zip(known, shape, strict=True))
    return f"[{', '.join(names)}]"


def _dtype_text(expr: relax.Expr) -> str:
    known = isinstance(expr.ty, relax.TensorType) and expr.ty.dtype is not None
    return dtype_of(expr) if known else "?"


def _count_matmuls(func: relax.Function) -> int:
    count = 0

    def visit(expr: relax.Expr) -> None:
        nonlocal count
        count += op_name(expr) == "matmul"

    relax.analysis.post_order_visit(func, visit)
    return count


@mutator
class _Rewriter(PyExprMutator):
    """Binds each site's last variable to the call; what only led there becomes dead."""

    def __init__(self, mod: tvm.IRModule, linears: list[_Linear]) -> None:
        super().__init__(mod)
        self.linears = {linear.result: linear for linear in linears}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        linear = self.linears.get(binding.var)
        if linear is None:
            super().visit_var_binding_(binding)
            return
        operands = [self.visit_expr(linear.x), self.visit_expr(linear.weight)]
        if linear.bias is not None:
            bias = self.visit_expr(linear.bias)
            shape = shape_of(bias)
            if shape is not None and len(shape) > 1:
                bias = self.builder_.emit(relax.op.reshape(bias, [shape[-1]]))
            operands.append(bias)
        call = relax.op.call_dps_packed(linear.function, operands, out_ty=binding.var.ty)
        var = self.visit_var_def(binding.var)
        self.builder_.emit_normalized(relax.VarBinding(var, self.builder_.normalize(call)))
