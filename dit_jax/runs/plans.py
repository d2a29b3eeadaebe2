"""Plans of a run's training step on a TPU that need not exist: one of them, or the best of many."""

import jax

from dit_jax import settings as settings_lib
from dit_jax.machine import sharding
from dit_jax.machine import words as words_lib
from dit_jax.models import dit, fields
from dit_jax.planning import plan
from dit_jax.runs import build
from dit_jax.sampling import generate

CHOICES = ("data", "fsdp", "tensor", "remat")  # what a sweep tries
GIVEN = ("labels", "key_data")  # what a sampling takes, of `sampling.generate.make`


def plan_one(settings, target):
    """The figures of the training step of a settings on a Target."""
    parts = build.parts(settings, target.devices)
    args = plan.arguments(parts.abstract_state(), batch(settings), parts.mesh)
    work = settings.train.batch_size * parts.train_flops
    figures = plan.make(parts.jit_step(), args, target, model_flops=work)
    choice = choices(settings, parts.mesh)
    chosen = {name: choice[name] for name in ("mesh", "remat", "shard_optimizer")}
    return choice | figures | {"advice": plan.advise(figures, **chosen)}


def plan_sampling(settings, target):
    """The figures of sampling one batch, train.batch_size images, without the autoencoder."""
    parts, size = build.parts(settings, target.devices), settings.train.batch_size
    keys = jax.eval_shape(lambda: jax.random.key_data(generate.image_keys(0, size)))
    labels = jax.ShapeDtypeStruct((size,), "int32")
    place = sharding.replicated(parts.mesh)
    given = sharding.abstract({"labels": labels, "key_data": keys}, dict.fromkeys(GIVEN, place))
    args = parts.abstract_state().params, given
    sampling = parts.process, settings.sampling
    work = size * generate.count_flops(parts.model, *sampling)
    figures = plan.make(parts.generate, args, target, model_flops=work)
    advice = [] if figures["fits"] else ["lower config.train.batch_size: fewer images at a time"]
    figures |= {"network_calls": generate.count_calls(*sampling), "advice": advice}
    if seconds := figures.get("estimated_seconds"):
        names = ("with_overlap", "without_overlap")
        figures["images_per_second"] = {name: size / seconds[name] for name in names}
    return choices(settings, parts.mesh) | {"sampler": settings.sampling.sampler} | figures


def choices(settings, mesh):
    """What was planned."""
    return {
        "model": f"{settings.model.name} {settings.model.conditioning}",
        "input_size": list(settings.model.input_size),
        "batch_size": settings.train.batch_size,
        "mesh": dict(mesh.shape),
        "shard_optimizer": settings.mesh.shard_optimizer,
        "remat": settings.compute.remat,
        "unroll": settings.compute.unroll,
    }


def batch(settings):
    """{name: (shape, dtype)} of a global batch: the posterior of latents, or pixels."""
    model, size = settings.model, settings.train.batch_size
    if settings.data.space == "latents":
        images = {"posterior": ((size, *model.input_size, 2 * model.in_channels), "float32")}
    else:
        images = {"image": ((size, *model.input_size, model.in_channels), "uint8")}
    return images | {"label": ((size,), "int32")}


def sweep(settings, target):
    """Figures of the choices worth trying, best first; prints each, then the best one."""
    at_once = settings.train.batch_size // settings.train.accumulation_steps
    _, size, heads = dit.SIZES[settings.model.size]
    options = {"heads": heads, "width": fields.mlp_width(settings.model.mlp, size)}
    found = plan.meshes(len(target.devices), batch_size=at_once, **options)
    if not found:  # plan_one raises the UserError that says why
        found = [{name: getattr(settings.mesh, name) for name in CHOICES[:3]}]
    print(" ".join(f"{name:>6s}" for name in CHOICES), "    GB of limit  ms with, without overlap")

    def try_one(mesh, remat):
        figures = plan_one(settings_lib.replace(settings, changes(mesh, remat)), target)
        print(row(figures), flush=True)
        return figures

    rows = plan.rank([try_one(mesh, "dots") for mesh in found])
    if rows[0]["fits"]:
        rows += [try_one(rows[0]["mesh"], remat) for remat in ("none", "full")]
    else:
        rows += [try_one(mesh, "full") for mesh in found]
    rows = plan.rank(rows)
    print("\nBest first, by the compiler's estimate, not a measurement:")
    print("\n".join(row(figures) for figures in rows))
    print(f"\nThe best: {as_flags(rows[0])}\n" if rows[0]["fits"] else "\nNone fits.\n")
    show(rows[0])
    return rows


def row(figures):
    """One line of a sweep."""
    memory, seconds = figures["memory_gb"], figures.get("estimated_seconds")
    words = " ".join(f"{size:6d}" for size in figures["mesh"].values()) + f" {figures['remat']:>6s}"
    size = f"{memory['total']:6.2f}" if "total" in memory else "   ..."
    words += f" {size} of {memory['limit']:5.1f}"
    if not figures["fits"] or seconds is None:
        return f"{words}  does not fit"
    return f"{words} {seconds['with_overlap'] * 1e3:8.1f} {seconds['without_overlap'] * 1e3:8.1f}"


def as_flags(figures):
    """The flags that select what a row of a sweep tried."""
    return plan.as_flags(changes(figures["mesh"], figures["remat"]))


def changes(mesh, remat):
    """What a row of a sweep changes in the settings."""
    return {f"mesh.{name}": size for name, size in mesh.items()} | {"compute.remat": remat}


def show(figures):
    """Prints the figures of one plan."""
    memory, seconds = figures["memory_gb"], figures.get("estimated_seconds")
    calls = figures.get("network_calls")  # of a sampling
    unit = "batch" if calls else "step"
    mesh = " ".join(f"{name} {size}" for name, size in figures["mesh"].items())
    lines = {
        "model": f"{figures['model']}, batch {figures['batch_size']}",
        "devices": f"{figures['devices']} x {figures['device_kind']} ({figures['topology']})",
        "mesh": f"{mesh}, remat {figures['remat']}",
        "memory per device": ", ".join(f"{size:.2f} {name}" for name, size in memory.items())
        + " (GB)",
        "fits": "yes" if figures["fits"] else "no",
        f"TFLOPs per {unit}": f"{figures['flops_model'] / 1e12:.4g} of the model, "
        f"{figures['flops_program'] / 1e12:.4g} in the program",
    }
    if calls:
        lines["sampler"] = f"{figures['sampler']}, {words_lib.count(calls, 'network call')}"
    if seconds:
        mfu = figures["estimated_mfu"]
        for name, words in {
            "arithmetic": "computation alone",
            "with_overlap": "communication overlapped",
            "without_overlap": "without overlap",
        }.items():
            text = f"{seconds[name] * 1e3:.1f} ms, MFU {mfu[name]:.1%}"
            if name in figures.get("images_per_second", {}):
                text += f", {figures['images_per_second'][name]:.4g} images/s"
            lines[f"estimated {unit}, {words}"] = text
        kinds = figures["arithmetic_seconds"].items()
        lines["of the computation"] = ", ".join(
            f"{kind} {spent * 1e3:.1f} ms" for kind, spent in kinds
        )
        sent = sum(each["wire_bytes"] for each in figures["collectives"])
        lines[f"sent per device and {unit}"] = (
            f"{sent / 1e9:.2f} GB, {seconds['links'] * 1e3:.1f} ms at "
            f"{figures['link_bytes_per_second'] / 1e9:.0f} GB/s"
        )
        lines["compiled in"] = f"{figures['compile_seconds']:.0f} s"
    for name, text in lines.items():
        print(f"{name:48s} {text}")
    for each in figures.get("collectives", []):
        sizes = f"{each['bytes'] / 1e6:10.2f} MB of results {each['wire_bytes'] / 1e6:10.2f} sent"
        print(f"  {each['count']:5d} x {each['kind']:20s} among {each['group']:4d} {sizes}")
    for line in figures["advice"]:
        print(f"to make it fit: {line}")
    if seconds:
        print("Times are the compiler's estimates, not measurements.")
