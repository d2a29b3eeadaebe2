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


def environment(devices=1):
    """Of a process with that many CPU devices.

    Without the compilation cache: on CPUs, several processes that read one hang.
    """
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    flags = f"{kept.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return kept | {"XLA_FLAGS": flags}
