r"""DiT on ImageNet 256x256, as in the paper: latents of 32x32x4.

    dit-prepare ILSVRC2012_img_train.tar data/imagenet
    dit-convert vae runs/vae --from_hub=stabilityai/sd-vae-ft-ema
    dit-train configs/imagenet256.py:XL/2 runs/xl2 \
        --config.data.path=data/imagenet --config.data.vae=runs/vae

Variants: S, B, L, XL with patch 2, 4, 8. The paper's FID-50K at 400K steps without guidance: XL/2
19.47, L/2 23.33, B/2 43.47, S/2 68.40 (table 4); XL/2 after 7M steps with guidance 1.5: 2.27.
Hardware: the authors' TPU v3-256 made 5.7 steps/s of XL/2, so 400K steps took about 20 hours.

`--config.data.source=synthetic` trains on random latents instead, to measure speed.
"""

from configs import base


def get_config(variant="XL/2"):
    config = base.get_config()
    base.set_variant(config, variant)
    return config
