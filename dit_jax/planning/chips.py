"""The generations of TPUs that a plan can be made for, and the sources of their figures."""

import math
import re
from typing import NamedTuple

from dit_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """A generation of TPUs. A device is what JAX calls a device: a core or a chip.

    devices: of a chip. memory: bytes of a device. flops_per_cycle: of the matrix units of a device,
    in bfloat16. link_rate: bytes/s that a chip can send over all its links together, one way.
    sides: number of axes of a topology. most: chips of a whole pod. example: a topology.
    """

    devices: int
    memory: float
    flops_per_cycle: int
    link_rate: float
    sides: int
    most: int
    example: str


# memory and most: Google Cloud's page of each version (cloud.google.com/tpu/docs/v3 and so on);
# memory is what the compiler allows if that is less (v6e 31.5, tpu7x 95 GiB).
# flops_per_cycle: 2 for each cell of the matrix units, which are 128 x 128, and 256 x 256 from v6e
# on. v6e and tpu7x are taken with four units a device, as their peaks and the compiler's cycles
# imply. The clocks that follow from the peaks are 687, 938, 1049, 1503, 1751, 1750 and 2200 MHz;
# 700, 940 and 1050 are published for the first three (Jouppi et al. 2020, doi:10.1145/3360307, and
# 2023, arXiv:2304.01433).
# link_rate: v2 4 links of 496 Gbit/s (Jouppi et al. 2020); v3 4 of 70 GB/s and v4 6 of 50 GB/s
# (Jouppi et al. 2023, table 4; the older paper has 656 Gbit/s, 82 GB/s, for v3); later ones half of
# the "bidirectional ICI bandwidth per chip" on Google's pages.
CHIPS = {
    "v2": Chip(2, 8 * GIB, 2 * 1 * 128**2, 4 * 62e9, 2, 256, "v2:2x2"),
    "v3": Chip(2, 16 * GIB, 2 * 2 * 128**2, 4 * 70e9, 2, 1024, "v3:8x16"),
    "v4": Chip(1, 32 * GIB, 2 * 8 * 128**2, 6 * 50e9, 3, 4096, "v4:2x2x4"),
    "v5e": Chip(1, 16 * GIB, 2 * 4 * 128**2, 200e9, 2, 256, "v5e:4x4"),
    "v5p": Chip(1, 95 * GIB, 2 * 8 * 128**2, 600e9, 3, 8960, "v5p:2x2x2"),
    "v6e": Chip(1, 31.5 * GIB, 2 * 4 * 256**2, 400e9, 2, 256, "v6e:2x4"),
    "tpu7x": Chip(2, 95 * GIB, 2 * 4 * 256**2, 600e9, 3, 9216, "tpu7x:2x2x1"),
}


def parse(topology):
    """(generation, chips along each side) of a topology as "v3:8x16"; UserError for other text."""
    name, _, sides = topology.partition(":")
    is_size = re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})+", sides)
    extents = tuple(map(int, sides.split("x"))) if is_size else ()
    if name not in CHIPS or len(extents) != CHIPS[name].sides:
        refuse(topology)
    count, most = math.prod(extents), CHIPS[name].most
    if count > most:  # libtpu accepts some of these, and takes minutes
        raise UserError(
            f"topology must be of at most {most} chips, a whole {name} pod, got {topology!r}, "
            f"which has {count}"
        )
    return name, extents


def refuse(topology):
    """Raises the UserError for a topology that does not exist."""
    examples = ", ".join(chip.example for chip in CHIPS.values())
    raise UserError(
        f"topology must be a generation and the chips along each side, as {examples}, of a size "
        f"that is built, got {topology!r}"
    )
