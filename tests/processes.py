"""Flags and environment for several processes of a command that form a cluster on this machine."""

import os
import socket


def free_address():
    """An address that no process of this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def flags(address, count, i):
    """The flags of process i of `count`."""
    return [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"]


def environment():
    """Without the compilation cache: on CPUs, several processes that read one hang."""
    return {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
