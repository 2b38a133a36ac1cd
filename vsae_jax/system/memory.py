"""The memory of the devices."""

import os
import re
from pathlib import Path

import jax


def free_bytes() -> int:
    """Free bytes on one device; the devices of a CPU share the machine's."""
    device, n_devices = jax.local_devices()[0], jax.local_device_count()
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if found:
            return int(found[1]) * 1024 // n_devices
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // 2 // n_devices
