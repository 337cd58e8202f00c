"""FoldLayout: drop layout operators that cancel or do nothing."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from relax_passes.paginate.emitter import Emitter


@tvm.transform.module_pass(opt_level=0, name="FoldLayout")
class FoldLayout:
    """Emit every function again through the simplifying emitter.

    Before::

        y = R.reshape(x, [n, 1, 64]); z = R.reshape(y, [n, 64])
        t = R.permute_dims(z, [1, 0]); u = R.permute_dims(t, [1, 0]); v = R.astype(u, "float32")

    After (x being float32)::

        v = R.reshape(x, [n, 64])
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        folder = _Folder(mod)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function) and not (func.attrs and "Composite" in func.attrs):
                updated = relax.analysis.remove_all_unused(folder.fold(func))
                folder.builder_.update_func(gvar, updated)
        return folder.builder_.get()


@mutator
class _Folder(PyExprMutator):
    def fold(self, func: relax.Function) -> relax.Function:
        self.emitter = Emitter(self.builder_)
        return self.visit_expr(func)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if not isinstance(binding.var, relax.DataflowVar) or not isinstance(
            binding.value, relax.Call
        ):
            super().visit_var_binding_(binding)
            return
        value = self.emitter.emit(self.visit_expr(binding.value))
        if not isinstance(value, relax.Var):
            # An operator on a constant that does nothing.
            value = self.builder_.emit(value)
        self.set_var_remap(binding.var, value)
