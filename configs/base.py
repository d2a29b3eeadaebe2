"""Every field of a config, with the paper's values for 256x256 (Peebles & Xie 2023, sec. 4).

Not for use by itself: configs/imagenet256.py, imagenet512.py and digits.py start from it.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()  # the architecture: all that the parameters depend on
    config.model.size = "XL"  # Ti, S, B, L or XL
    config.model.patch_size = 2
    config.model.input_size = (32, 32)  # H, W of a latent: 256 / 8
    config.model.in_channels = 4
    config.model.num_classes = 1000
    config.model.null_label = True  # needed for class dropout and for guidance
    config.model.learn_sigma = True
    config.model.conditioning = "adaln_zero"  # in_context, cross_attention, adaln or adaln_zero

    config.compute = ConfigDict()  # how to compute with it
    config.compute.dtype = "bfloat16"  # of the arithmetic; parameters are float32
    config.compute.attention = "auto"  # xla, cudnn; auto: cudnn on a GPU in bfloat16, else xla
    config.compute.remat = "none"  # none, dots, full: least memory last
    config.compute.unroll = False  # compile every block apart

    config.mesh = ConfigDict()  # the devices; may change when a run is taken up again
    config.mesh.data = -1  # copies of the model, each with its part of the batch; -1: the rest
    config.mesh.fsdp = 1  # divides the batch and the parameters, which are gathered block by block
    config.mesh.tensor = 1  # divides heads and MLPs
    config.mesh.shard_optimizer = True  # average and optimizer over mesh.data too (ZeRO-1)

    config.diffusion = ConfigDict()
    config.diffusion.schedule = "linear"  # linear or squared_cosine
    config.diffusion.num_steps = 1000

    config.data = ConfigDict()
    config.data.source = "images"  # digits, images, latents or synthetic
    config.data.space = "latents"  # what the model's units stand for: pixels or latents
    config.data.path = ""  # what dit-prepare (or tensorflow-datasets) or dit-encode wrote
    config.data.split = "train"
    config.data.flip = True  # half of the images, anew in every epoch
    config.data.vae = ""  # what dit-convert vae wrote: it encodes images, and shows latents
    config.data.vae_dtype = "float32"  # or bfloat16: faster, a little off

    config.train = ConfigDict()
    config.train.batch_size = 256  # of all devices together
    config.train.accumulation_steps = 1
    config.train.class_dropout_prob = 0.1
    config.train.learning_rate = 1e-4
    config.train.b1 = 0.9
    config.train.b2 = 0.999
    config.train.eps = 1e-8
    config.train.weight_decay = 0.0
    config.train.warmup_steps = 0
    config.train.decay_steps = 0  # cosine decay of the rate to 0 over so many steps; 0: constant
    config.train.ema_decay = 0.9999
    config.train.ema_warmup = False  # let the average forget the start of a short run

    config.sampling = ConfigDict()  # how samples are drawn unless said otherwise
    config.sampling.sampler = "ddpm"  # ddpm or ddim
    config.sampling.num_steps = "250"  # or "ddim50": every 20th step
    config.sampling.eta = 0.0  # of ddim
    config.sampling.clip_x0 = False  # right for pixels only
    config.sampling.cfg_scale = 1.5  # 1: no guidance
    config.sampling.cfg_channels = 3  # the paper's; 0: all
    config.sampling.cfg_interval = (0, 999)  # steps t at which to guide, first and last

    config.run = ConfigDict()  # may change when a run is taken up again
    config.run.total_steps = 400_000  # 80 epochs: 80 * 1,281,167 / 256
    config.run.log_every = 100
    config.run.checkpoint_every = 5_000
    config.run.keep_checkpoints = 2  # the newest, and one more while a new one is read back
    config.run.keep_best = 0  # and those of the lowest loss, the mean since the one before
    config.run.verify_checkpoints = True  # read back before others are deleted; checked on restore
    config.run.max_rollbacks = 0  # times to go back to the last save where a run diverges
    config.run.spike_factor = (
        0.0  # of the usual loss: a step above it has diverged; 0: NaN, inf only
    )
    config.run.sample_every = 10_000  # a grid of samples and the loss curve
    config.run.num_samples = 16  # in that grid
    return config.lock()  # a field that is none of these is a mistake


def set_variant(config, variant):
    """Sets model.size and model.patch_size from a name as "XL/2"."""
    size, slash, patch_size = variant.partition("/")
    if not slash or not patch_size.isdecimal():
        raise ValueError(f"a variant must be SIZE/PATCH, as XL/2, got {variant!r}")
    config.model.size, config.model.patch_size = size, int(patch_size)
