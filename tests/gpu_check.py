"""The parts of launch/gpu_check.sh that are Python; each is one process.

    python tests/gpu_check.py golden|attention|resume --out=FILE   # numerical checks
    python tests/gpu_check.py profile FLAG... --out=FILE           # kernels of a training step
    python tests/gpu_check.py best --out=FOLDER                    # prints the fastest training
    python tests/gpu_check.py table --out=FOLDER                   # results.json and results.md

A check writes a list of rows {"check", "error", "bound"}; one without an error could not run and
has a "reason". Errors are relative to the largest expected value. FOLDER has a folder for each
check, case and profile: out.json, log, status (exit code and seconds) and the flags of its config.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from testdata import weights

from dit_jax.cli import arguments
from dit_jax.convert import torch_dit
from dit_jax.diffusion import gaussian, losses, schedules
from dit_jax.machine import devices
from dit_jax.models import attention, dit

ROOT = Path(__file__).parents[1]
# bfloat16 has 8 bits, and an error grows through 12 blocks: 0.011 on a CPU. By default a GPU
# multiplies float32 in TF32, which has 11 bits. The tests have the first bound too.
ARITHMETIC = {
    "float32 highest": ("float32", "highest", 1e-4),
    "float32 default": ("float32", "default", 5e-3),
    "bfloat16": ("bfloat16", "default", 3e-2),
}
ATTENTION_BOUND = 2e-2  # some units of the last of 8 bits, 2^-8


def relative(actual, expected):
    """The largest error relative to the largest expected value; NaN if one is NaN."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def golden():
    """The forward pass and the loss of DiT-S beside the numbers of the official code."""
    with np.load(ROOT / "tests/testdata/golden.npz") as file:
        expected = dict(file)
    rows = []
    for name, (dtype, precision, bound) in ARITHMETIC.items():
        options = {"dtype": dtype, "attention": devices.resolve_attention("auto", dtype)}
        label = f"{name}, {options['attention']}"
        with jax.default_matmul_precision(precision):
            for patch_size in (4, 8):
                apply, params = make_model(patch_size, options)
                model = f"DiT-S/{patch_size}"
                x, t = images(f"x{model}", 2), jnp.asarray([17, 801])
                out = apply(params, x, t=t, y=jnp.asarray([3, 1000]))
                error = relative(out, channels_last(expected[f"forward/{model}"]))
                rows.append({"check": f"{model} forward, {label}", "error": error, "bound": bound})
            rows += golden_loss(expected, *make_model(4, options), label, bound)
    return rows


def golden_loss(expected, apply, params, label, bound):
    """Rows of the loss at sixteen steps, each relative to its own value."""
    schedule = schedules.linear(1000)
    t = [0, 1, 2, 5, 10, 20, 50, 100, 200, 300, 400, 500, 700, 900, 998, 999]
    t, y = np.array(t, np.int32), np.arange(0, 66 * 16, 66, dtype=np.int32)
    x0, noise = np.float32(0.8) * images("x0", 16), images("noise", 16)
    x_t = gaussian.q_sample(schedule, x0, t, noise)
    out = apply(params, x_t, t=t, y=y)
    terms = losses.objective(schedule, out, x0=x0, x_t=x_t, t=t, noise=noise)
    rows = []
    for name in ("mse", "vb", "loss"):
        error = relative(terms[name] / expected[f"loss/{name}"], np.ones(16))
        rows.append({"check": f"DiT-S/4 {name}, {label}", "error": error, "bound": bound})
    return rows


def make_model(patch_size, options):
    """The jitted DiT-S and its parameters, with the weights of `testdata/weights.py`."""
    config = dit.configure("S", patch_size)
    shapes = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    empty = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    official = {
        name: x if name == "pos_embed" else np.float32(weights.tensor(name, x.shape))
        for name, x in torch_dit.to_official(empty, config).items()
    }
    params = jax.tree.map(jnp.asarray, torch_dit.from_official(official, config))
    return jax.jit(dit.make_apply(config, **options)), params


def images(tag, count):
    return channels_last(weights.array(tag, (count, 4, 32, 32)))


def channels_last(x):
    return x.transpose(0, 2, 3, 1)


def check_attention():
    """cuDNN's and our attention in bfloat16 beside float32, forward and gradients."""
    names = ["xla", "cudnn"] if jax.default_backend() == "gpu" else ["xla"]
    rows = []
    for head_size in (64, 72):
        for tokens in (256, 258, 1024):
            shape = (2, tokens, 4, head_size)  # (N, T, K, D/K)
            draw = np.random.default_rng(tokens + head_size).standard_normal
            given = [jnp.asarray(draw(shape, np.float32), jnp.bfloat16) for _ in range(4)]
            exact = [x.astype(jnp.float32) for x in given]
            with jax.default_matmul_precision("highest"):
                expected = forward_and_gradients("xla", *exact)
            for name in names:
                rows += attention_rows(name, given, expected)
    return rows


def attention_rows(name, given, expected):
    """A row each of the output and the gradients, or one that says why there are none."""
    _, tokens, _, head_size = given[0].shape
    label = f"attention {name}, {tokens} tokens, head size {head_size}"
    try:
        actual = forward_and_gradients(name, *given)
    except Exception as error:  # of cuDNN, XLA or jax: each has its own
        return [{"check": label, "reason": one_line(f"{type(error).__name__}: {error}")}]
    errors = [relative(x.astype(jnp.float32), y) for x, y in zip(actual, expected, strict=True)]
    parts = {"forward": errors[0], "gradients": float(np.max(errors[1:]))}  # np.max keeps NaN
    return [
        {"check": f"{label}, {part}", "error": error, "bound": ATTENTION_BOUND}
        for part, error in parts.items()
    ]


def forward_and_gradients(name, q, k, v, d_x):
    """The output and the gradients of q, k and v, whose output has the gradient d_x."""

    @jax.jit
    def run(q, k, v, d_x):
        x, backward = jax.vjp(attention.ATTENTIONS[name], q, k, v)
        return x, *backward(d_x)

    return run(q, k, v, d_x)


def resume(folder):
    """A training that stopped after 3 of 6 steps and was resumed, beside an unbroken one."""
    import small_run

    environment = dict(os.environ)
    if jax.default_backend() == "gpu":  # which else sums in an order that varies
        more = environment.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
        environment["XLA_FLAGS"] = more

    def train(name, last):
        flags = ["--config.data.source=synthetic", "--config.train.batch_size=8"]
        flags += [f"--config.run.total_steps={last}", "--config.run.checkpoint_every=3"]
        flags += ["--config.run.log_every=1", f"--config.compute.dtype={os.environ['DTYPE']}"]
        config = f"--config=configs/imagenet256.py:{os.environ['CHECK_MODEL']}"
        command = small_run.command(folder / name, config, *flags)
        subprocess.run(command, cwd=ROOT, env=environment, check=True)

    for name, lasts in {"unbroken": [6], "resumed": [3, 6]}.items():
        for last in lasts:
            train(name, last)
    a, b = (small_run.read_arrays(folder / name, "params") for name in ("unbroken", "resumed"))
    error = max(relative(b[name], a[name]) for name in a if np.abs(a[name]).max())
    same = small_run.digests(folder / "unbroken", 6) == small_run.digests(folder / "resumed", 6)
    check = f"resumed training, {'' if same else 'not '}bit-identical to an unbroken one"
    return [{"check": check, "error": error, "bound": 0}]


def profile(given, folder):
    """The kernels of the training step of the config in the flags; the trace goes to the folder."""
    from dit_jax.runs import kernels

    values = flags.FlagValues()  # the fields of a config are read from sys.argv, which has them too
    arguments.define_config(values)
    values(["profile", *given])
    return kernels.profile(arguments.settings(values), folder / "trace")


def one_line(text):
    return " ".join(text.split())[:300]


def best(folder):
    """The name of the case that trains with the most FLOP/s; "" if there is none."""
    speeds = {}
    for path in folder.glob("case-train-*/out.json"):
        speeds[path.parent.name.removeprefix("case-")] = json.loads(path.read_text())
    return max(speeds, key=lambda name: speeds[name]["model_tflops_per_second"], default="")


def table(folder):
    """Writes results.json and results.md; returns 1 if a check failed, else 0."""
    results = {"checks": [], "cases": [], "profile": None}
    for path in sorted(folder.glob("*/status"), key=lambda path: path.stat().st_mtime_ns):
        kind, _, name = path.parent.name.partition("-")
        code, seconds = map(int, path.read_text().split())
        if done := code == 0:
            found = json.loads(path.with_name("out.json").read_text())
        else:
            found = {"reason": explain(code, seconds, path.with_name("log"))}
        if kind == "check":
            results["checks"] += found if done else [{"check": name} | found]
            continue
        used = path.with_name("flags").read_text().splitlines()
        row = {"case": name, "flags": used, "seconds": seconds} | found
        if kind == "profile":
            results["profile"] = row
        else:
            results["cases"].append(row)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    text = "\n".join(markdown(results)) + "\n"
    (folder / "results.md").write_text(text)
    print(text)
    return 0 if all(passes(row) for row in results["checks"]) else 1


def explain(code, seconds, log):
    """Why a process has no result, in one line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code == 124:
        return f"stopped after {seconds} s" if seconds else "not started: no time was left"
    return one_line(f"exit code {code}: {lines[-1] if lines else 'no output'}").replace("|", "/")


def passes(row):
    return row.get("error", np.nan) <= row.get("bound", 0)  # false for NaN


def markdown(results):
    """The lines of one table: checks, cases, kernels."""
    yield from ("| what | result | more |", "|---|---|---|")
    for row in results["checks"]:
        if "reason" in row:
            yield f"| {row['check']} | **failed** | {row['reason']} |"
        else:
            verdict = "passed" if passes(row) else "**failed**"
            yield f"| {row['check']} | {verdict} | error {row['error']:.1e} of {row['bound']:.0e} |"
    for row in results["cases"]:
        yield f"| {row['case']} | {' | '.join(case_cells(row))} |"
    profile = results["profile"]
    if profile:
        what = f"profile of {profile['case']}"
        if "reason" in profile:
            yield f"| {what} | **failed** | {profile['reason']} |"
            return
        more = f"kernels {profile['kernels_ms']:.1f} ms"
        yield f"| {what} | {profile['traced_step_ms']:.1f} ms/step, traced | {more} |"
        for kernel in profile["kernels"]:
            name = one_line(kernel["kernel"]).replace("|", "/")[:80]
            cells = f"{kernel['ms']:.2f} ms | {kernel['share']:.1%}, {kernel['calls']:g} calls"
            yield f"| kernel `{name}` | {cells} |"


def case_cells(row):
    """The two cells of a case: its speed, and what else was measured."""
    if "reason" in row:
        return "**failed**", row["reason"]
    more = [f"compiled in {row['compile_seconds']:.0f} s", f"{row['peak_memory_gb']:.1f} GB"]
    if "mfu" in row:
        more.insert(0, f"MFU {row['mfu']:.1%}")
    for peer in ("torch", "torch_compile"):
        if f"dit_jax_over_{peer}" in row:
            speed, ratio = row[f"{peer}_images_per_second"], row[f"dit_jax_over_{peer}"]
            more.append(f"{peer} {speed:.4g} images/s, ours {ratio:.2f} times as fast")
    return f"{row['images_per_second']:.4g} images/s", ", ".join(more)


def main(what, *given):
    out = Path(given[-1].removeprefix("--out="))
    if what == "best":
        print(best(out))
    elif what == "table":
        return table(out)
    else:
        if what == "profile":
            found = profile(given[:-1], out.parent)
        elif what == "resume":
            found = resume(out.parent)
        else:
            found = {"golden": golden, "attention": check_attention}[what]()
        out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
