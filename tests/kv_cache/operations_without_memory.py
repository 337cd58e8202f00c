"""Random operations, half of which are tried with an allocation that fails at a random place.

Run by test_faults_of_memory.py, in a process with failing_new.cc preloaded:
``python operations_without_memory.py EXAMPLES STEPS MANY``. What failed must have left the cache
byte for byte as it was, and succeeds when it is tried again.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis.stateful import initialize, run_state_machine_as_test
from test_random_operations import QUICK, ManyOperations, Operations

from tvm_flashinfer import kv_cache

process = ctypes.CDLL(None)
process.fail_allocation.argtypes = [ctypes.c_long]

#: Calls that change a cache outside a step, or begin one: after them it must be as before.
CHANGES = {
    f"vm.builtin.{name}"
    for name in (
        "kv_state_add_sequence",
        "kv_state_remove_sequence",
        "kv_state_fork_sequence",
        "kv_state_popn",
        "kv_state_begin_forward",
        "attention_kv_cache_enable_sliding_window_for_seq",
        "attention_kv_cache_commit_accepted_token_tree_nodes",
        "attention_kv_cache_prepare_import",
    )
}
#: Calls within a step, or of an import: tried again they must give what they would have given.
STEPS = {
    "tvm_flashinfer.kv_cache_attention",
    "tvm_flashinfer.kv_cache_attention_bhsd",
    "tvm_flashinfer.kv_cache_attention_with_mask",
    "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
    "vm.builtin.kv_state_end_forward",
    "vm.builtin.attention_kv_cache_export_page_group",
    "vm.builtin.attention_kv_cache_import_page_group",
    "vm.builtin.attention_kv_cache_finish_import",
}


class Injector:
    """Stands before the packed functions of every cache."""

    def __init__(self) -> None:
        self.function = kv_cache.function
        self.random = random.Random(0)
        self.machine: Operations | None = None
        self.failures: Counter[str] = Counter()

    def __call__(self, name: str) -> Callable[..., Any]:
        call = self.function(name)
        if self.machine is None or name not in CHANGES | STEPS:
            return call

        def tried(*args: Any) -> Any:
            if self.random.random() < 0.5:
                return call(*args)
            # Most calls allocate little: a failure soon is likelier to happen at all.
            process.fail_allocation(self.random.choice((1, 1, 2, 3, 4, 5, 7, 10, 15, 25)))
            try:
                return call(*args)
            except Exception:
                if not process.allocation_failed():
                    raise
            finally:
                process.fail_allocation(0)
            self.failures[name] += 1
            if name in CHANGES:
                self.machine.twin.check()
            return call(*args)

        return tried


injector = Injector()
kv_cache.function = injector


class Flaky:
    """Mixed into the operations: the injector follows the machine that runs."""

    @initialize(seed=Operations.seeds)
    def follow(self, seed: int) -> None:
        injector.random = random.Random(seed)
        injector.machine = self  # type: ignore[assignment]


class FlakyOperations(Flaky, Operations):
    pass


class ManyFlakyOperations(Flaky, ManyOperations):
    pass


if __name__ == "__main__":
    examples, steps, many = (int(argument) for argument in sys.argv[1:])
    machine = ManyFlakyOperations if many else FlakyOperations
    run_state_machine_as_test(
        machine, settings=settings(QUICK, max_examples=examples, stateful_step_count=steps)
    )
    print(json.dumps({"operations": machine.operations, "failures": injector.failures}))
