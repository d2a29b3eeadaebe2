"""Measures a training step with several batch sizes, remat policies and other ways to compute it.

A case is {TOPIC.FIELD: value}; those of a sweep have the fields in `NAMES`. If one does not fit
into the memory, or fails otherwise, its row says why, and the next one is tried.
"""

import gc

from dit_jax import settings as settings_lib
from dit_jax.diffusion import fields as diffusion_fields
from dit_jax.errors import UserError
from dit_jax.machine import devices
from dit_jax.planning import plan
from dit_jax.runs import bench

NAMES = ("train.batch_size", "compute.remat", "compute.unroll", "compute.attention")
SHORT = 120  # characters of the reason of a failure
HEADER = "batch   remat  unroll  attention   images/s  ms/step  compile s  GB needed"


def sweep(settings, batch_sizes=(), *, repeats, warmup):
    """The figures of a sweep on these devices, its rows fastest first; prints each row, then all.

    batch_sizes: to try; (): half, once and twice that of the settings. Each is tried with all remat
    policies. Then the fastest case at the settings' own batch size and the fastest of all are tried
    with unroll on and off, and with each attention that can run here. UserError if no case works.
    """
    rows, options = {}, {"repeats": repeats, "warmup": warmup}
    print(HEADER)

    def try_all(cases):
        for case in cases:
            if tuple(case.values()) not in rows:
                rows[tuple(case.values())] = found = measure(settings, case, **options)
                print(row(found), flush=True)
        return rank(rows.values())

    own = {name: settings_lib.flat(settings)[name] for name in NAMES}
    dtype, forward = settings.compute.dtype, diffusion_fields.is_mean_flow(settings.diffusion)
    attentions = devices.attentions(dtype, forward=forward)
    usual = devices.resolve_attention(settings.compute.attention, dtype, forward=forward)
    own["compute.attention"], size = usual, settings.train.batch_size
    sizes = batch_sizes or [x for x in (size // 2, size, 2 * size) if x]
    ranked = try_all(
        own | {"train.batch_size": x, "compute.remat": remat} for x in sizes for remat in plan.REMAT
    )
    for found in filter(None, (best(ranked, size), best(ranked))):
        ranked = try_all(variants(case_of(found), attentions))
    if not best(ranked):
        raise UserError(f"a case of the sweep must run on this machine, got {ranked[0]['failed']}")
    print(f"\nFastest first, on {devices.describe()}:\n{HEADER}")
    print("\n".join(row(found) for found in ranked))
    figures = {
        "what": "sweep",
        **bench.describe(settings),
        "best": flags(best(ranked, size)),
        "best_of_all": flags(best(ranked)),
        "rows": ranked,
    }
    print(f"\nThe best at batch size {size}: {figures['best'] or 'none ran'}")
    if figures["best_of_all"] != figures["best"]:
        print(f"The best of all: {figures['best_of_all']}")
        print("The batch size is of the training too: another one learns differently.")
    return figures


def variants(case, attentions):
    """The case with unroll off and on, and with each attention."""
    for unroll in (False, True):
        for attention in attentions:
            yield case | {"compute.unroll": unroll, "compute.attention": attention}


def measure(settings, case, *, repeats, warmup):
    """The figures of a case of any fields: its fields, then its speed, or why it "failed"."""
    changed = settings_lib.replace(settings, case)
    try:
        with devices.explained_memory():
            work = bench.prepare_train(changed)
            seconds, _ = bench.time_in_turn({"step": work.run}, repeats, warmup)
    except Exception as error:  # of any package: a case that fails must not end the sweep
        return case | {"failed": explain(error)}
    finally:
        gc.collect()  # frees the memory of the devices before the next case
    found = case | bench.summarize(seconds["step"], work.flops, changed)
    found["compile_seconds"] = work.compile_seconds
    return found | ({"needed_memory_gb": work.needed / 1e9} if work.needed else {})


def explain(error):
    """Why a case failed, in a line."""
    text = " ".join(str(error).split())
    if not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= SHORT else f"{text[:SHORT]}..."


def case_of(found):
    """The case of a row."""
    return {name: found[name] for name in NAMES}


def rank(rows):
    """Rows, those with the most images per second first and those that failed last."""
    return sorted(rows, key=lambda found: -found.get("images_per_second", 0))


def best(ranked, batch_size=None):
    """The first of the ranked rows that did not fail, of this batch size if one is given."""
    fits = (x for x in ranked if "failed" not in x)
    return next((x for x in fits if batch_size in (None, x["train.batch_size"])), None)


def flags(found):
    """The flags that select what a row tried; None for None."""
    return found and plan.as_flags(case_of(found))


def row(found):
    """One line of a sweep."""
    size, remat, unroll, attention = case_of(found).values()
    words = f"{size:5d}  {remat:>6s}  {'yes' if unroll else 'no':>6s}  {attention:>9s}"
    if "failed" in found:
        return f"{words}  fails: {found['failed']}"
    speed = f"{found['images_per_second']:9.4g}  {1e3 * found['seconds_median']:7.4g}"
    needed = f"{found['needed_memory_gb']:9.3g}" if "needed_memory_gb" in found else "  unknown"
    return f"{words}  {speed}  {found['compile_seconds']:9.3g}  {needed}"
