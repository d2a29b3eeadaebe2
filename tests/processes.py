"""Several processes of a command that find each other on this machine."""

import os
import socket


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def flags(address, count, i):
    """The flags of process i of `count`."""
    return [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"]


def environment():
    """Without the cache of compiled programs: on CPUs, several processes that load one hang."""
    return {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
