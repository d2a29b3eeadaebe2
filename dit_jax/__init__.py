"""dit_jax: Scalable Diffusion Models with Transformers (Peebles & Xie 2023) in JAX."""

__version__ = "0.1.0"  # setup.py reads it


def load(path, *, step=None, weights="ema", attention="auto", vae=None, vae_dtype="float32"):
    """The trained DiT of a training run's directory or of a converted checkpoint.

    dit = dit_jax.load("runs/digits"); then `dit.config`, `dit(x, t, y)`, `dit.sample([3, 1])`.
    `dit_jax.sampling.trained.LoadedDiT` says more. step: which saved step of a run; None: the
    newest. weights: "ema" or "params". vae: a checkpoint of `dit-convert vae`, to decode latents;
    vae_dtype: of its arithmetic, float32 or bfloat16.
    """
    from dit_jax.sampling import trained

    options = {"weights": weights, "attention": attention, "vae": vae, "vae_dtype": vae_dtype}
    return trained.load(path, step=step, **options)
