r"""Pixel MeanFlow: an image of ImageNet, in pixels and without an autoencoder, by one network call.

    dit-prepare ILSVRC2012_img_train.tar data/imagenet
    dit-train configs/meanflow_pixels.py:B/16 runs/pmf --config.data.path=data/imagenet
    dit-sample runs/pmf grid.png --labels=207,360

Lu et al. 2026, https://arxiv.org/abs/2601.22158; settings of https://github.com/Lyy-iiis/pMF. The
variants B/16 and L/16 have 256x256 pixels, B/32 and L/32 512x512. Two things are not as there:

- The authors add perceptual losses, LPIPS and features of ConvNeXt-V2, with weights that others
  trained. Here are none, so expect a higher FID-50K than their 3.12 for B/16.
- Their network takes all conditions as tokens. This one is JiT's, as configs/jit256.py has it.

This config was not run to its end.
"""

from configs import base, jit256

GUIDANCE = {  # the scale and its times, by the variant, for one network call
    "B/16": (8.5, (0.1, 0.7)),
    "B/32": (6.5, (0.1, 0.7)),
    "L/16": (7.0, (0.2, 0.7)),
    "L/32": (7.5, (0.2, 0.6)),
}
NOISE_SCALE = {"B/32": 2.0, "L/32": 4.0}
HALF_LIFE = {"L/16": 1_000_000}  # of the EMA, in images


def get_config(variant="B/16"):
    config = base.get_config()
    base.set_variant(config, variant)
    jit256.set_parts(config)
    bottleneck, first = jit256.SIZES.get(config.model.size, jit256.SIZES["B"])
    config.model.bottleneck, config.model.class_tokens_from = bottleneck, first
    config.model.class_tokens = 32
    config.model.velocity_head = True
    config.model.input_size = (16 * config.model.patch_size,) * 2
    config.model.in_channels = 3

    config.diffusion.process = "improved_mean_flow"
    config.diffusion.prediction = "x0"
    config.diffusion.time = "logit_normal"
    config.diffusion.time_mean = 0.0 if variant == "L/32" else 0.8
    config.diffusion.time_std = 0.8
    config.diffusion.same_times = 0.5
    config.diffusion.noise_scale = NOISE_SCALE.get(variant, 1.0)
    config.diffusion.omega_decay = 2.0 if variant == "L/16" else 1.0

    config.data.space = "pixels"

    config.compute.dtype = "float32"  # as the authors; bfloat16: du/dt has an error of 1 %

    config.train.batch_size = 1024
    config.train.optimizer = "muon"
    # Theirs is 1e-3, for updates with a root mean square of 768^-0.5 in B. Here that is 0.2.
    config.train.learning_rate = 1.8e-4  # 1e-3 * 768**-0.5 / 0.2
    config.train.b2 = 0.95
    config.train.ema_decay = 0.5 ** (1024 / HALF_LIFE.get(variant, 2_000_000))
    config.train.ema_warmup = True

    config.sampling.sampler = "euler"
    config.sampling.num_steps = "1"
    config.sampling.cfg_scale = 1.0  # omega is the guidance
    config.sampling.cfg_channels = 0
    config.sampling.omega, config.sampling.omega_interval = GUIDANCE.get(variant, GUIDANCE["B/16"])

    config.run.total_steps = 400_000  # 320 epochs: 320 * 1,281,167 / 1024
    return config
