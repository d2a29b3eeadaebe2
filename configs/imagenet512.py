r"""DiT on ImageNet 512x512, as in the paper: latents of 64x64x4.

    dit-train configs/imagenet512.py:XL/2 runs/xl2-512 \
        --config.data.path=data/imagenet --config.data.vae=runs/vae

The paper's FID-50K of XL/2 after 3M steps: 11.93 without guidance, 3.04 with guidance 1.5.
`--config.data.source=synthetic` trains on random latents instead, to measure speed.
"""

from configs import base


def get_config(variant="XL/2"):
    config = base.get_config()
    base.set_variant(config, variant)
    config.model.input_size = (64, 64)  # H, W of a latent: 512 / 8
    config.compute.remat = "dots"
    config.run.total_steps = 3_000_000
    return config
