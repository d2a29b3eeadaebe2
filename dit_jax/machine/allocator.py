"""Keeps the memory that this process has got from the system, for computing on a CPU.

glibc's malloc gives the large buffers of a step back to the system after each step. The next step
gets them anew, page by page: 400,000 page faults, and a quarter of the time, in a training step of
DiT-S/2 with 8 examples.
"""

import ctypes
import os
from pathlib import Path

SWITCH = "DIT_KEEP_MEMORY"  # an environment variable; 0: leave the allocator as it is
OPTIONS = {  # of glibc's <malloc.h>: its number, the value
    "M_ARENA_MAX": (-8, 1),  # one heap for all threads
    "M_MMAP_MAX": (-4, 0),  # no buffer outside of the heap
    "M_TRIM_THRESHOLD": (-1, -1),  # the heap never shrinks
    "M_TOP_PAD": (-2, 64 * 2**20),  # it grows by so many bytes more than are needed
}
ACCELERATORS = ("nvidia0", "kfd", "accel0", "vfio")  # in /dev: of NVIDIA, AMD, and two of TPUs


def keep_memory(devices=Path("/dev")):
    """Sets OPTIONS; before anything large is allocated. Returns whether they are set.

    Does nothing if the machine has an accelerator, if LD_PRELOAD or a MALLOC_* variable is set, if
    SWITCH is 0, or if the C library is not glibc. Once they are set, the memory of the process
    never shrinks.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "LD_PRELOAD" in os.environ
    has_accelerator = any((devices / name).exists() for name in ACCELERATORS)
    if chosen or has_accelerator or os.environ.get(SWITCH) == "0":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all([library.mallopt(*option) for option in OPTIONS.values()])
