"""How TVM's pool of threads is set up: one for each core, and none of them pinned."""

from __future__ import annotations

import os
from pathlib import Path

#: Read by TVM when its pool starts, in this order.
VARIABLES = ("TVM_NUM_THREADS", "OMP_NUM_THREADS")
#: How often an idle thread of the pool looks for work before it sleeps. TVM's own 300,000 keep the
#: core from the BLAS's threads for the whole of a short prompt's products (38 instead of 52
#: thousand tokens/s here); without any, waking up doubles the time of a small model's step.
SPIN_COUNT = 10_000
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def num_cores() -> int:
    """Cores this process may run on; two hardware threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add(Path(_SIBLINGS.format(cpu)).read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def num_threads() -> int:
    """Threads of TVM's pool."""
    for variable in VARIABLES:
        if os.environ.get(variable, "").isdigit():
            return max(1, int(os.environ[variable]))
    return num_cores()


def use_every_core() -> None:
    """Ask TVM for a thread per core, unless the environment says otherwise already.

    TVM itself takes half of the CPUs it sees on x86, as if each core showed twice. In virtual
    machines they often don't, and half of the machine would idle. Call it before the pool starts.
    """
    if not any(variable in os.environ for variable in VARIABLES):
        os.environ["TVM_NUM_THREADS"] = str(num_cores())
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(SPIN_COUNT))
    # TVM pins its workers, but not the thread that calls them. Where that one happens to run on a
    # worker's core the two share it until the kernel moves one, some milliseconds later: a decode
    # step of 7 ms then takes 13.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
