"""One attention of a module, explained: its graph, the variant derived from it, the C++ made.

explanation = explain(mod, 3)
print(explanation.before, explanation.after, explanation.source, sep="\\n\\n")
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax

from relax_passes.graph import Graph, op_name
from relax_passes.inject import RUNTIME_FUNCTION, InjectAttention
from relax_passes.known_shapes import with_known_shapes
from relax_passes.module_file import ModuleError
from relax_passes.recognize import find_sites
from relax_passes.report import Report, SiteReport
from relax_passes.targets import resolve_target
from tvm_flashinfer.jit import AttentionSpec, kernel_source


@dataclass(frozen=True)
class Explanation:
    """``before`` and ``after`` are lines of TVMScript; ``source`` is the kernel's C++, "" for a
    site that is left alone.
    """

    site: SiteReport
    before: str
    after: str
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        site = {name: getattr(self.site, name) for name in self.site.__dataclass_fields__}
        return {"site": site, "before": self.before, "after": self.after, "source": self.source}


@dataclass
class _Kernels:
    """Takes the place of the JIT: kernels are described, not compiled."""

    specs: list[AttentionSpec] = field(default_factory=list)

    @dataclass(frozen=True)
    class Named:
        symbol: str

    def __call__(self, spec: AttentionSpec) -> Any:
        self.specs.append(spec)
        return self.Named(f"kernel_{len(self.specs) - 1}")


def inspect_module(mod: tvm.IRModule) -> Report:
    """What InjectAttention would do to every site of a module; no kernel is compiled."""
    return _inject(mod)[1]


def _inject(mod: tvm.IRModule) -> tuple[tvm.IRModule, Report, _Kernels]:
    report, kernels = Report(), _Kernels()
    inject = InjectAttention(target=resolve_target("native"), report=report, build=kernels)
    return tvm.transform.Sequential([inject])(mod), report, kernels


def explain(mod: tvm.IRModule, number: int) -> Explanation:
    """The site with this number in the report.

    Raises
    ------
    ModuleError
        There is no such site.
    """
    new, report, kernels = _inject(mod)
    if not 0 <= number < len(report.sites):
        last = len(report.sites) - 1
        accepted = f"accepted are 0 to {last}" if report.sites else "the module has no attention"
        raise ModuleError(f"site is {number}; {accepted}.")
    row = report.sites[number]
    earlier = sum(site.rewritten for site in report.sites[:number])
    before = _lines_before(mod, number)
    if not row.rewritten:
        return Explanation(row, before, before, "")
    calls = [
        binding
        for graph in _graphs(new)
        for binding in graph.bindings
        if RUNTIME_FUNCTION in _callee(binding.value)
    ]
    source = kernel_source(kernels.specs[earlier], "table")
    return Explanation(row, before, _line(calls[earlier]), source)


def _graphs(mod: tvm.IRModule) -> list[Graph]:
    return [Graph(f) for _, f in mod.functions_items() if isinstance(f, relax.Function)]


def _callee(value: Any) -> str:
    return str(value.args[0]) if op_name(value) == "call_dps_packed" else ""


def _lines_before(mod: tvm.IRModule, number: int) -> str:
    """The bindings between the tensors that q, k and v are read from and the product with v."""
    for _, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        graph = Graph(with_known_shapes(func))
        sites = find_sites(func, graph)
        if number >= len(sites):
            number -= len(sites)
            continue
        site = sites[number]
        end = site.product if site.product is not None else site.anchor
        starts = {view.tensor for view in site.views or ()}
        wanted, stack = set(), [end]
        while stack:
            var = stack.pop()
            if var in wanted or var in starts or var not in graph.value:
                continue
            wanted.add(var)
            # Without operands that are proven, the softmax and what it reads must do.
            if starts or op_name(graph.value[var]) != "matmul":
                stack.extend(graph.reads(var))
        return "\n".join(_line(b) for b in graph.bindings if b.var in wanted)
    return ""


def _line(binding: relax.VarBinding) -> str:
    """A binding as TVMScript, without the variables that its printer declares before it."""
    lines = str(binding.script(show_meta=False)).splitlines()
    name = binding.var.name
    starts = [n for n, line in enumerate(lines) if line.startswith((f"{name}: ", f"{name} = "))]
    return "\n".join(lines[starts[-1] if starts else 0 :]).strip()
