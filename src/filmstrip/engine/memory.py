"""How much memory this process may still take, of the host or of a GPU; knows nothing of what it is for."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_UNLIMITED = 1 << 60
"""Limits above this mean that there is none (version 1 control groups write a number near 2**63)."""


def free_host_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of the machine that can be had without swapping; in a container with a limit, what is left of that."""
    free = psutil.virtual_memory().available
    for group, names in _control_groups(proc, cgroups):
        left = _left_in(group, *names)
        if left is not None:
            free = min(free, left)
    return max(free, 0)


def free_device_bytes(device: torch.device, utilization: float) -> int:
    """Memory of a CUDA device that is free, less the share ``1 - utilization`` of all of it that is to stay free."""
    free, total = torch.cuda.mem_get_info(device)
    return max(int(free - total * (1 - utilization)), 0)


def _control_groups(proc: Path, cgroups: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """The memory control groups this process is in, inner ones first, and what their files are called.

    Formats of ``/proc/PID/cgroup`` and of the files: cgroups(7) and the kernel's cgroup-v1/memory.rst and cgroup-v2.rst.
    In a container the path is often the host's, of which only a part is mounted, so parents are looked at, too.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        found += [(each, names) for each in (group, *group.parents) if each == root or root in each.parents]
    return found


def _left_in(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Bytes left under a group's limit, counting file pages that nobody reads as free; None if it has no limit."""
    try:
        limit = (group / limit_name).read_text().strip()
        if limit == "max" or int(limit) >= _UNLIMITED:
            return None
        usage = int((group / usage_name).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - usage + int(statistics.get(cache_name, 0))
    except (OSError, ValueError):  # not mounted here, or of a form not known: then it says nothing
        return None
