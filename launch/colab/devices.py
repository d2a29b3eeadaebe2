"""Which devices jax finds, as one line of JSON: [backend, count, kind, bytes of memory of one].

`start.py` runs it in a process of its own, because a TPU belongs to the first process that asks.
"""

import json

import jax

if __name__ == "__main__":
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    print(json.dumps([jax.default_backend(), jax.device_count(), device.device_kind, memory]))
