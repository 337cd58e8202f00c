"""From what a user writes to a TVM target, and this machine's CPU."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from tvm.target import Target, codegen

#: Instruction sets worth checking: a virtual machine may hide what its CPU model has.
_CHECKED = [
    "avx",
    "avx2",
    "fma",
    "f16c",
    "bmi",
    "bmi2",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512cd",
    "avx512vnni",
    "avx512bf16",
    "avx512fp16",
    "avxvnni",
    "amx-tile",
    "amx-bf16",
    "amx-int8",
]
#: The kernel's spelling in /proc/cpuinfo where it is not LLVM's.
_CPUINFO = {
    "bmi": "bmi1",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avxvnni": "avx_vnni",
    "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
}
NATIVE = ("native", "cpu", "llvm")


class TargetError(ValueError):
    """A target TVM does not know; the message is one sentence."""


def resolve_target(text: str) -> Target:
    """A TVM target from ``"native"`` (or ``"cpu"``, ``"llvm"``: this CPU), ``"llvm -mcpu=NAME"``,
    a kind such as ``"cuda"``, a tag, or JSON such as ``{"kind": "llvm", "mcpu": "znver3"}``."""
    text = text.strip()
    if text in NATIVE:
        return native_target()
    try:
        if text.startswith("{"):
            return Target(json.loads(text))
        kind, *options = text.split()
        if not options:
            return Target(text)
        return Target({"kind": kind, **dict(_option(o) for o in options)})
    except (ValueError, TypeError, RuntimeError) as err:
        reason = str(err).strip().splitlines()[0].rstrip(".") if str(err).strip() else "no reason"
        raise TargetError(
            f"{text!r} is no target TVM knows ({reason}); accepted are native, "
            "'llvm -mcpu=NAME', cuda and the other kinds and tags of TVM."
        ) from None


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.lstrip("-").partition("=")
    if not text.startswith("-") or not separator:
        raise ValueError(f"the option {text!r} is not of the form -name=value")
    if name in ("keys", "mattr", "libs"):
        return name, value.split(",")
    return name, int(value) if value.isdigit() else value


def native_target() -> Target:
    """``llvm`` for the CPU of this machine, with its vector extensions."""
    cpu = codegen.llvm_get_system_cpu()
    config: dict[str, Any] = {"kind": "llvm", "mcpu": cpu}
    missing = _missing_features(Target(config))
    if missing:
        config["mattr"] = [f"-{name}" for name in missing]
    return Target(config)


def kernel_cpu(target: Target) -> str:
    """What ``-march`` a C++ kernel for ``target`` is compiled with."""
    cpu = str(target.attrs.get("mcpu", "")) or "x86-64"
    return "native" if cpu == codegen.llvm_get_system_cpu() else cpu


def _missing_features(target: Target) -> list[str]:
    """Extensions LLVM expects of the CPU model that this machine does not offer."""
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.is_file():
        return []
    flags: set[str] = set()
    for line in info.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    if not flags:
        return []
    expected = {str(name) for name in codegen.llvm_get_cpu_features(target)}
    return [f for f in _CHECKED if f in expected and _CPUINFO.get(f, f) not in flags]
