"""dit_jax: Scalable Diffusion Models with Transformers (Peebles & Xie 2023) in JAX."""


def load(path, *, weights="ema", attention="auto", vae=None, vae_dtype="float32"):
    """The trained DiT of a training run's directory or of a converted checkpoint.

    dit = dit_jax.load("runs/digits"); then `dit.config`, `dit(x, t, y)` and `dit.sample([3, 1])`:
    see `dit_jax.trained.LoadedDiT`. weights: "ema" or "params". vae: what `dit-convert vae` wrote,
    to decode the samples of a model of latents; vae_dtype: of its arithmetic, float32 or bfloat16.
    """
    from dit_jax import trained  # here, so that importing a part does not import the whole

    return trained.load(path, weights=weights, attention=attention, vae=vae, vae_dtype=vae_dtype)
