"""How the time of a training step grows with the number of tokens, and with the batch.

For T tokens the arithmetic of a step is a T + b T^2, where b comes from attention, times the batch.
Time that grows faster than that is spent on memory; time that grows more slowly, on what every step
costs.
"""

import math

import numpy as np

from dit_jax.errors import UserError
from dit_jax.runs import bench, tuning

SIDES = (8, 16, 32, 64)  # patches along each side: 64 to 4,096 tokens
NUM_BATCHES = 5  # the batch size of the settings, half of it, a quarter, ...


def measure(settings, *, repeats, warmup):
    """The figures of steps with several sizes of images, then with several batches.

    rows: {"tokens": [row], "batch": [row]}; what a row has is in `tuning.measure`. exponents: of
    each, {"measured": of the time, "counted": of the FLOPs}; None where fewer than two cases ran.
    Prints each row. UserError if no case ran.
    """
    size, patch = settings.train.batch_size, settings.model.patch_size
    batches = sorted({size >> i for i in range(NUM_BATCHES)} - {0})
    cases = {
        "tokens": [{"model.input_size": (side * patch,) * 2} for side in SIDES],
        "batch": [{"train.batch_size": batch} for batch in batches],
    }
    print("tokens  batch  ms/step   TFLOP")
    rows = {}
    for axis, changes in cases.items():
        rows[axis] = []
        for change in changes:
            found = tuning.measure(settings, change, repeats=repeats, warmup=warmup)
            lengths = found.pop("model.input_size", settings.model.input_size)
            tokens = math.prod(length // patch for length in lengths)
            rows[axis] += [{"tokens": tokens, "batch": found.pop("train.batch_size", size)} | found]
            print(row(rows[axis][-1]), flush=True)
    failed = [each.get("failed") for each in rows["tokens"] + rows["batch"]]
    if all(failed):
        raise UserError(f"a case of the growth must run on this machine, got {failed[0]}")
    exponents = {axis: fit(each, axis) for axis, each in rows.items()}
    for axis, found in exponents.items():
        if found:
            print(f"time grows as {axis}^{found['measured']:.2f}, FLOPs ^{found['counted']:.2f}")
    return {
        "what": "growth",
        **bench.describe(settings),
        "rows": rows,
        "exponents": exponents,
    }


def row(found):
    """One line of the table."""
    words = f"{found['tokens']:6d}  {found['batch']:5d}"
    if "failed" in found:
        return f"{words}  fails: {found['failed']}"
    return f"{words}  {1e3 * found['seconds_median']:7.4g}  {tflop(found):6.3g}"


def tflop(found):
    """TFLOP of the step of a row."""
    return found["model_tflops_per_second"] * found["seconds_median"]


def fit(rows, axis):
    """The exponents of rows along an axis, by least squares of the logarithms."""
    ran = [each for each in rows if "failed" not in each]
    if len(ran) < 2:
        return None
    x = np.log([each[axis] for each in ran])
    grown = {"measured": [each["seconds_median"] for each in ran], "counted": map(tflop, ran)}
    return {name: float(np.polyfit(x, np.log(list(y)), 1)[0]) for name, y in grown.items()}


def draw(path, rows):
    """Writes a picture of the rows of `measure`: times, and times in proportion to the FLOPs."""
    from dit_jax.evals import plots

    panels = {}
    for axis, label in (("tokens", "tokens of an image"), ("batch", "images of a step")):
        ran = [each for each in rows[axis] if "failed" not in each]
        lists = [(each[axis], each["seconds_median"], tflop(each)) for each in ran]
        if lists:
            panels[label] = tuple(map(list, zip(*lists, strict=True)))
    plots.growth(path, panels)
