r"""MeanFlow on ImageNet 256x256: a DiT that draws an image with one network call.

    dit-train configs/meanflow.py:B/4 runs/meanflow \
        --config.data.path=data/imagenet --config.data.vae=runs/vae
    dit-sample runs/meanflow grid.png --vae=runs/vae --labels=207,360 --num_steps=1

Data and autoencoder are those of configs/imagenet256.py. The settings are those of the authors' B/4
(https://github.com/Gsunshine/meanflow). Their README gives its FID-50K for one network call: 11.35
after 240 epochs and 19.15 after 80, and 48.16 and 61.09 without guidance, which is
`--config.diffusion.kappa=0`. Variants: B, M, L, XL with patch 2, 4, 8. All get the omega and kappa
of B/4; the paper's appendix has those of the larger ones. A training step takes 2.03 times the
multiply-adds of flow matching, and 1.38 times without guidance.

Improved MeanFlow, which takes the scale of guidance as a condition, has a config of its own:
configs/meanflow_improved.py.
"""

from configs import base


def get_config(variant="B/4"):
    config = base.get_config()
    base.set_variant(config, variant)

    config.diffusion.process = "mean_flow"
    config.diffusion.time = "logit_normal"
    config.diffusion.time_mean = -0.4
    config.diffusion.omega = 1.0
    config.diffusion.kappa = 0.5  # guidance of scale 2

    config.compute.dtype = "float32"  # as the authors; bfloat16: du/dt has an error of 1 %

    config.train.b2 = 0.95

    config.sampling.sampler = "euler"
    config.sampling.num_steps = "1"
    config.sampling.cfg_scale = 1.0  # it is in the weights

    config.run.total_steps = 1_200_000  # 240 epochs: 240 * 1,281,167 / 256
    return config
