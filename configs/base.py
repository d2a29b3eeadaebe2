"""Every field of a config, with the paper's values for 256x256 (Peebles & Xie 2023, sec. 4).

Don't train with it: configs/imagenet256.py, imagenet512.py and digits.py start from it.
A new field also needs a default in dit_jax/settings.py, the value that older runs had.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()  # the architecture: everything that the parameters depend on
    config.model.size = "XL"  # Pi, Na, Ti, XS (for tiny images), S, B, M, L, XL, H or G
    config.model.depth = 0  # so many blocks; 0: those of the size
    config.model.patch_size = 2
    config.model.input_size = (32, 32)  # H, W of a latent: 256 / 8; any number of axes
    config.model.in_channels = 4
    config.model.num_classes = 1000
    config.model.null_label = True  # needed for class dropout and for guidance
    config.model.learn_sigma = placeholder(bool)  # learn the variance too; None: of ddpm
    # in_context, cross_attention, adaln or adaln_zero; or in_context_zero, of improved MeanFlow
    config.model.conditioning = "adaln_zero"
    config.model.conditions = placeholder(tuple)  # inputs, such as t,y; None: by the process
    config.model.velocity_head = False  # of improved_mean_flow: a second output, the velocity
    config.model.head_depth = 0  # so many of the last blocks are there twice, once for each output
    config.model.norm = "layer"  # of the blocks and of the end: layer, or rms, with weights
    config.model.mlp = "gelu"  # or swiglu: gated, with as many multiply-adds
    # sincos: a fixed table. rope: the table, and attention rotates q and k by row and column.
    # learned_rope: as rope, with a learned table. rope_1d: no table; rotates by the token number
    config.model.position = "sincos"
    config.model.qk_norm = False  # RMSNorm of queries and keys in self-attention
    config.model.bottleneck = 0  # numbers of a patch before D; 0: from p*p*C to D in one linear
    config.model.class_tokens = 0  # tokens of the label that join the others on their way
    config.model.class_tokens_from = 0  # before this block; 0: the first

    config.compute = ConfigDict()  # how; all but dtype may change when a run is resumed
    config.compute.dtype = "bfloat16"  # of the arithmetic; parameters stay float32
    config.compute.attention = "auto"  # xla, cudnn or auto: cudnn on a GPU in bfloat16, else xla
    config.compute.remat = "none"  # none, dots or full; full needs the least memory
    config.compute.unroll = False  # compile every block separately: slower to compile

    config.mesh = ConfigDict()  # the devices; may change when a run is resumed
    config.mesh.data = -1  # data parallelism; -1: all devices that the other axes leave
    config.mesh.fsdp = 1  # shards batch and parameters; all-gathers the latter block by block
    config.mesh.tensor = 1  # shards heads and MLPs
    config.mesh.shard_optimizer = True  # shards EMA and optimizer over mesh.data too (ZeRO-1)

    config.diffusion = ConfigDict()
    config.diffusion.process = "ddpm"  # or a path: linear (flow matching) or gvp, without steps;
    # or mean_flow or improved_mean_flow, which sample in one step
    config.diffusion.schedule = "linear"  # of ddpm: linear or squared_cosine
    config.diffusion.num_steps = 1000  # of ddpm
    config.diffusion.prediction = "auto"  # noise, v, x0, velocity; auto: noise, velocity of a path
    config.diffusion.time = "uniform"  # how training draws t; paths: logit_normal too
    config.diffusion.time_mean = 0.0  # of the logit of logit_normal; above 0: more noise
    config.diffusion.time_std = 1.0
    config.diffusion.stratified = False  # one t from each of batch_size equal parts: less variance
    config.diffusion.shift = 1.0  # of a path, above 1: more noise, in training and sampling
    config.diffusion.time_scale = placeholder(float)  # of a path: the network gets t, in 0 .. 1,
    # times this; None: 1,000, and 1 for the mean flows
    config.diffusion.reverse_time = False  # of a path: the network gets 1 - t; with scale 1, as SiT
    config.diffusion.weight = (
        "constant"  # of the loss: min_snr, soft_min_snr, p2, velocity; logs mse
    )
    config.diffusion.weight_gamma = 0.0  # of that weight; 0: 5, for p2 1
    config.diffusion.same_times = 0.75  # of mean flows: share of examples that learn the velocity
    config.diffusion.uniform_times = 0.0  # of mean flows: share of examples with uniform times
    config.diffusion.adaptive_power = 1.0  # of mean flows: divides the squared error by its power
    config.diffusion.adaptive_eps = 0.01  # added to that divisor
    config.diffusion.omega = 1.0  # of mean_flow: guidance inside training, with the scale
    config.diffusion.kappa = 0.5  # omega / (1 - kappa); 1 and 0: none
    config.diffusion.omega_interval = (0, 1)  # guide at first <= t <= last
    config.diffusion.omega_max = 8.0  # of improved_mean_flow: the largest scale that it learns
    config.diffusion.omega_decay = 1.0  # above 0: more of the small scales
    config.diffusion.noise_scale = 1.0  # of a path: its noise has this standard deviation

    config.data = ConfigDict()
    config.data.source = "images"  # digits, images, latents or synthetic
    config.data.space = "latents"  # what the model generates: pixels or latents
    config.data.path = ""  # of dit-prepare (or tensorflow-datasets) or dit-encode; may be gs://
    config.data.cache = ""  # folder for copies of data in a bucket; "": ~/.cache/dit_jax
    config.data.split = "train"
    config.data.classes = ()  # train on these only, as labels 0, 1, ...; (): on all; digits only
    config.data.flip = True  # flip half of the images, drawn anew in every epoch
    config.data.vae = ""  # output of dit-convert vae: encodes images and decodes samples
    config.data.vae_dtype = "float32"  # or bfloat16: faster and less exact

    config.train = ConfigDict()
    config.train.batch_size = 256  # over all devices
    config.train.accumulation_steps = 1
    config.train.class_dropout_prob = 0.1
    config.train.optimizer = "adamw"  # or muon, for the kernels of the blocks
    config.train.learning_rate = 1e-4
    config.train.b1 = 0.9
    config.train.b2 = 0.999
    config.train.eps = 1e-8
    config.train.weight_decay = 0.0
    config.train.clip_norm = 0.0  # scale gradients to a norm of at most this; 0: never
    config.train.warmup_steps = 0
    config.train.decay_steps = 0  # cosine decay of the rate to 0 by this step; 0: constant rate
    config.train.ema_decay = 0.9999
    config.train.ema_warmup = False  # lets the EMA of a short run forget its start
    config.train.ema_snapshot_every = 0  # steps; for averages chosen later, by dit-ema; 0: none
    config.train.ema_widths = (0.05, 0.1)  # of these averages: spread over the steps, relative
    config.train.frozen = ()  # not trained: paths with a match of these regular expressions
    config.train.route_share = 0.0  # of the tokens, which skip the middle blocks: TREAD
    config.train.route_blocks = ()  # first and last of these blocks; (): all but the ends

    config.sampling = ConfigDict()  # the defaults of dit-sample; may change when a run is resumed
    config.sampling.sampler = "ddpm"  # ddpm, ddim, euler, heun, sde, dpm2m or unipc
    config.sampling.num_steps = "250"  # 250 steps; "ddim50": every 20th; "999,600,300": these
    config.sampling.spacing = "auto"  # of so many steps: linspace, leading, trailing or log_snr
    config.sampling.shift = 0.0  # above 1: more steps near noise, on a path; 0: as in training
    config.sampling.eta = 0.0  # noise of ddim, 0 to 1
    config.sampling.sde_noise = "sigma"  # how sde adds noise; see diffusion/README.md
    config.sampling.sde_last = 0.04  # the last step of sde on a path; 0: as the others
    config.sampling.clip_x0 = False  # clip predicted pixels to [-1, 1]; wrong for latents
    config.sampling.cfg_scale = 1.5  # 1: no guidance
    config.sampling.cfg_schedule = "constant"  # linear or cosine: rises from 1 to cfg_scale
    config.sampling.cfg_channels = 3  # guide the first 3 channels, as the paper; 0: all
    config.sampling.cfg_interval = placeholder(tuple)  # guide at first <= t <= last; None: always
    config.sampling.omega = 1.0  # guidance that improved_mean_flow takes as a condition; 1: none
    config.sampling.omega_interval = (0, 1)  # the times that it is for
    config.sampling.cache = "none"  # run blocks in every:3 steps, every:3:10-40, steps:0+4+8-11
    config.sampling.cache_guidance = "none"  # of these, steps that run the null pass; as cache
    config.sampling.cache_order = 1  # of the forecast of the other steps, 0 .. 3; 0: reuse
    config.sampling.cache_fit = "taylor"  # or chebyshev: a smooth fit to one value more

    config.run = ConfigDict()  # may change when a run is resumed
    config.run.total_steps = 400_000  # 80 epochs: 80 * 1,281,167 / 256
    config.run.log_every = 100
    config.run.checkpoint_every = 5_000
    config.run.keep_checkpoints = 2  # the newest; one more while a new one is verified
    config.run.keep_best = 0  # also keep that many steps, the best of all saved ones
    config.run.keep_best_by = "loss"  # the mean since the step before; "score": Frechet distance
    config.run.verify_checkpoints = True  # read back before others are deleted; checked on restore
    config.run.max_rollbacks = 0  # how often a diverged run goes back to its last save
    config.run.spike_factor = 0.0  # losses above this times the usual diverge; 0: only NaN, inf
    config.run.sample_every = 10_000  # a grid of samples and the loss curve
    config.run.num_samples = 16  # in that grid
    config.run.score_every = 0  # Frechet distance and KID to the training images; 0: never
    config.run.score_samples = 500  # for these scores
    config.run.loggers = ()  # tensorboard, wandb: metrics and samples go there too
    return config.lock()  # setting any other field is an error


def set_variant(config, variant, known=()):
    """Sets model.size and model.patch_size from a name such as "XL/2".

    known: all variants of a config that has values of its own for each.
    """
    size, slash, patch_size = variant.partition("/")
    if not slash or not patch_size.isdecimal():
        raise ValueError(f"a variant must be SIZE/PATCH, such as XL/2, got {variant!r}")
    if known and variant not in known:
        hint = "set model.size and model.patch_size for another"
        raise ValueError(f"the variant must be one of {', '.join(known)}, got {variant!r}; {hint}")
    config.model.size, config.model.patch_size = size, int(patch_size)
