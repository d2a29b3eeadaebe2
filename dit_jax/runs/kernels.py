"""Which kernels take the time of a training step, from a trace of jax.profiler."""

import collections
import time
from pathlib import Path

import jax

from dit_jax.runs import bench

CONTAINERS = ("while", "call", "conditional")  # on a CPU; they only run other kernels


def profile(settings, folder, *, steps=3, count=10):
    """{figure: value} of traced training steps on random data, with the `count` largest kernels.

    folder: for the trace, which TensorBoard and Perfetto show. Times are milliseconds per step;
    kernels of different streams may overlap, so their sum may exceed the step.
    """
    run = bench.prepare_train(settings).run
    started = time.perf_counter()
    with jax.profiler.trace(str(folder)):
        for _ in range(steps):
            run()
    milliseconds = 1e3 * (time.perf_counter() - started) / steps
    path = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    totals = read(path)
    busy = sum(nanoseconds for nanoseconds, _ in totals.values())
    largest = sorted(totals.items(), key=lambda each: -each[1][0])[:count]
    return {
        "traced_step_ms": milliseconds,  # with the cost of tracing
        "kernels_ms": busy / 1e6 / steps,
        "kernels": [
            {
                "kernel": name,
                "ms": nanoseconds / 1e6 / steps,
                "share": nanoseconds / busy,
                "calls": calls / steps,
            }
            for name, (nanoseconds, calls) in largest
        ],
    }


def read(path):
    """{kernel: (nanoseconds, calls)} of a trace, an .xplane.pb file.

    On a GPU these are the events of its streams; on a CPU, the operations of XLA.
    """
    data = jax.profiler.ProfileData.from_file(str(path))
    planes = [(plane.name, list(plane.lines)) for plane in data.planes]
    streams = [
        line
        for name, lines in planes
        if name.startswith("/device:GPU")
        for line in lines
        if line.name.startswith("Stream")
    ]
    lines = streams or [line for _, lines in planes for line in lines]
    totals = collections.defaultdict(lambda: (0, 0))
    for line in lines:
        for event in line.events:
            if streams or _is_operation(event):
                nanoseconds, calls = totals[event.name]
                totals[event.name] = nanoseconds + event.duration_ns, calls + 1
    return dict(totals)


def _is_operation(event):
    is_container = event.name.split(".")[0] in CONTAINERS
    return not is_container and any(name == "hlo_op" for name, _ in event.stats)
