"""Diffusion Transformer (DiT), Peebles & Xie 2023, in one self-contained PyTorch file.

    import dit
    images = dit.load(".").sample([3, 1, 4])  # "." contains config.json and model.safetensors

It implements all four designs of the paper. The parameters have the names of the official code
(https://github.com/facebookresearch/DiT), so official state dicts load.
Needs torch and safetensors. Licence: Apache-2.0.
Shapes: N batch, C channels, H W grid, T tokens, D hidden size, K heads, p patch size, S steps.
Images are (N, C, H, W).
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FREQUENCIES = 256  # size of the sinusoidal embedding of t


def timestep_embedding(t):
    """Sinusoids of the step, [cos, sin]. t (N,) -> (N, 256) float32."""
    half = FREQUENCIES // 2
    frequencies = np.exp(-np.log(10_000) * np.arange(half) / half).astype(np.float32)
    angles = t[:, None].float() * torch.from_numpy(frequencies).to(t.device)  # (N, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, 256)


def position_table(height, width, hidden_size):
    """Fixed 2-D sinusoids (1, T, D), [sin, cos]; the first half of D encodes the column."""
    quarter = hidden_size // 4
    omega = 1 / 10_000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = [np.outer(index.ravel(), omega) for index in (column, row)]  # 2 of (T, D/4)
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(waves, axis=1).astype(np.float32))[None]  # (1, T, D)


def layer_norm(x):
    """LayerNorm over D, without scale and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head self-attention over T."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        n, t, d = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, K, T, D/K)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, t, d))  # (N, T, D)


class CrossAttention(nn.Module):
    """Multi-head attention from T tokens to the two condition tokens."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, memory):
        n, t, d = x.shape
        q = self.q(x).view(n, t, self.num_heads, -1).transpose(1, 2)  # (N, K, T, D/K)
        kv = self.kv(memory).view(n, memory.shape[1], 2, self.num_heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each (N, K, 2, D/K)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, t, d))  # (N, T, D)


class Mlp(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # (N, T, D)


class InContextBlock(nn.Module):
    """Attention and MLP; x already contains the condition as two extra tokens (fig. 3)."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size)

    def forward(self, x, c):
        """x (N, T, D), c (N, 2, D) -> (N, T, D). All blocks share this interface.

        c holds the embeddings of t and y.
        """
        x = x + self.attn(layer_norm(x))
        return x + self.mlp(layer_norm(x))


class CrossAttentionBlock(InContextBlock):
    """Self-attention, cross-attention to the two condition tokens, and MLP."""

    def __init__(self, hidden_size, num_heads):
        super().__init__(hidden_size, num_heads)
        self.cross_attn = CrossAttention(hidden_size, num_heads)

    def forward(self, x, c):
        x = x + self.attn(layer_norm(x))
        x = x + self.cross_attn(layer_norm(x), c)
        return x + self.mlp(layer_norm(x))


class AdaLNBlock(InContextBlock):
    """Attention and MLP; the condition shifts and scales the input of each."""

    chunks = 4

    def __init__(self, hidden_size, num_heads):
        super().__init__(hidden_size, num_heads)
        linear = nn.Linear(hidden_size, self.chunks * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear)

    def modulation(self, c):
        """c (N, 2, D) -> `chunks` tensors of (N, 1, D)."""
        return self.adaLN_modulation(c.sum(dim=1, keepdim=True)).chunk(self.chunks, dim=-1)

    def forward(self, x, c):
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.modulation(c)
        x = x + self.attn(modulate(layer_norm(x), shift_msa, scale_msa))
        return x + self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp))


class AdaLNZeroBlock(AdaLNBlock):
    """An AdaLNBlock whose condition also gates the output of each branch."""

    chunks = 6

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulation(c)
        x = x + gate_msa * self.attn(modulate(layer_norm(x), shift_msa, scale_msa))
        return x + gate_mlp * self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp))


BLOCKS = {
    "in_context": InContextBlock,
    "cross_attention": CrossAttentionBlock,
    "adaln": AdaLNBlock,
    "adaln_zero": AdaLNZeroBlock,
}


class FinalLayer(nn.Module):
    """LayerNorm and a linear map. adaptive: adaLN, for the two adaLN designs (sec. 3.2)."""

    def __init__(self, hidden_size, out_features, adaptive):
        super().__init__()
        self.adaptive = adaptive
        if adaptive:
            self.adaLN_modulation = nn.Sequential(
                nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size)
            )
        self.linear = nn.Linear(hidden_size, out_features)

    def forward(self, x, c):
        x = layer_norm(x)
        if self.adaptive:
            c = self.adaLN_modulation(c.sum(dim=1, keepdim=True))  # (N, 1, 2D)
            x = modulate(x, *c.chunk(2, dim=-1))
        return self.linear(x)  # (N, T, p*p*out_channels)


class DiT(nn.Module):
    """Predicts the noise in x_t and, in further channels, the variance code of the step."""

    def __init__(
        self,
        *,
        input_size,
        patch_size,
        in_channels,
        depth,
        hidden_size,
        num_heads,
        num_classes,
        null_label,
        learn_sigma,
        conditioning,
    ):
        super().__init__()
        self.input_size, self.patch_size = tuple(input_size), patch_size
        self.in_channels, self.out_channels = in_channels, (1 + learn_sigma) * in_channels
        self.num_classes, self.null_label = num_classes, null_label
        self.conditioning = conditioning
        # The dicts with one entry exist only to give the parameters their official names.
        proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.x_embedder = nn.ModuleDict({"proj": proj})
        fc1, fc2 = nn.Linear(FREQUENCIES, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(fc1, nn.SiLU(), fc2)})
        labels = nn.Embedding(num_classes + null_label, hidden_size)
        self.y_embedder = nn.ModuleDict({"embedding_table": labels})
        rows, columns = (extent // patch_size for extent in self.input_size)
        table = position_table(rows, columns, hidden_size)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(
            BLOCKS[conditioning](hidden_size, num_heads) for _ in range(depth)
        )
        adaptive = conditioning.startswith("adaln")
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels, adaptive)

    def forward(self, x, t, y):
        """x (N, C, H, W), t (N,) steps, y (N,) labels -> (N, out_channels, H, W)."""
        x = x.to(self.pos_embed.dtype)
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2)  # (N, T, D)
        x, tokens = x + self.pos_embed, x.shape[1]
        t = self.t_embedder["mlp"](timestep_embedding(t).to(x.dtype))  # (N, D)
        c = torch.stack([t, self.y_embedder["embedding_table"](y)], dim=1)  # (N, 2, D)
        if self.conditioning == "in_context":
            x = torch.cat([x, c], dim=1)  # (N, T+2, D)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x[:, :tokens], c))

    def unpatchify(self, x):
        """(N, T, p*p*C) -> (N, C, H, W); in a patch, the channel varies fastest."""
        p, (height, width) = self.patch_size, self.input_size
        x = x.view(len(x), height // p, width // p, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, height, width)


def make_schedule(schedule, num_steps, spacing):
    """Returns (alpha_bar, timestep), lists over the steps that `spacing` keeps.

    schedule: "linear" or "squared_cosine". spacing: "250" for evenly spaced steps, "ddim50" for
    equal strides. timestep: the steps' numbers in the full schedule.
    """
    if schedule == "linear":  # Ho et al. 2020, sec. 4
        beta = np.linspace(1e-4, 0.02, num_steps, dtype=np.float64) * 1000 / num_steps
    else:  # Nichol & Dhariwal 2021, eq. 17
        time = np.arange(num_steps + 1, dtype=np.float64) / num_steps
        alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    kept = keep_steps(num_steps, str(spacing))
    return np.cumprod(1 - beta)[kept].tolist(), kept.tolist()


def keep_steps(num_steps, spacing):
    """Returns the steps that a spacing keeps, in ascending order."""
    count = int(spacing.removeprefix("ddim"))
    if not 2 <= count <= num_steps:
        raise ValueError(f"num_steps must be 2 to {num_steps}, got {spacing}")
    if not spacing.startswith("ddim"):
        strides = np.full(count, (num_steps - 1) / (count - 1))
        strides[0] = 0
        return np.rint(np.cumsum(strides)).astype(np.int64)
    stride = -(-num_steps // count)  # rounded up
    if len(range(0, num_steps, stride)) == count:
        return np.arange(0, num_steps, stride)
    raise ValueError(f"num_steps must have an integer stride over {num_steps} steps, got {spacing}")


def ddpm(denoise, x, alpha_bar, timestep, *, noise, clip_x0=False):
    """Ancestral sampling (Ho et al. 2020, alg. 2): x_T (N, C, H, W) -> x_0.

    denoise(x, t) returns the noise and the variance code (or None). noise(i) returns the noise that
    step i adds; step 0, the last one, adds none.
    """
    before = [1.0, *alpha_bar[:-1]]
    beta = [1 - now / earlier for now, earlier in zip(alpha_bar, before, strict=True)]
    variance = [b * (1 - before[i]) / (1 - alpha_bar[i]) for i, b in enumerate(beta)]
    for i in reversed(range(len(alpha_bar))):
        predicted, code = denoise(x, timestep[i])
        x0 = (1 / alpha_bar[i]) ** 0.5 * x - (1 / alpha_bar[i] - 1) ** 0.5 * predicted
        if clip_x0:
            x0 = x0.clamp(-1, 1)
        x0_share = beta[i] * before[i] ** 0.5 / (1 - alpha_bar[i])
        x_share = (1 - before[i]) * (1 - beta[i]) ** 0.5 / (1 - alpha_bar[i])
        x = x0_share * x0 + x_share * x
        if i == 0:
            return x
        if code is None:
            x = x + beta[i] ** 0.5 * noise(i)
        else:  # between the posterior variance and beta (Nichol & Dhariwal 2021, eq. 15)
            share = (code + 1) / 2
            log_variance = share * math.log(beta[i]) + (1 - share) * math.log(variance[i])
            x = x + torch.exp(0.5 * log_variance) * noise(i)


def ddim(denoise, x, alpha_bar, timestep, *, noise, clip_x0=False, eta=0.0):
    """Song et al. 2021, eq. 12 and 16. With eta 0 it is deterministic and uses no noise."""
    before = [1.0, *alpha_bar[:-1]]
    for i in reversed(range(len(alpha_bar))):
        predicted, _ = denoise(x, timestep[i])
        signal, rest = (1 / alpha_bar[i]) ** 0.5, (1 / alpha_bar[i] - 1) ** 0.5
        x0 = signal * x - rest * predicted
        if clip_x0:
            x0 = x0.clamp(-1, 1)
            predicted = (signal * x - x0) / rest
        variance = (1 - before[i]) / (1 - alpha_bar[i]) * (1 - alpha_bar[i] / before[i])
        sigma = eta * variance**0.5
        x = before[i] ** 0.5 * x0 + (1 - before[i] - sigma**2) ** 0.5 * predicted
        if sigma:
            x = x + sigma * noise(i)
    return x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim}


def make_denoiser(model, y, *, cfg_scale, cfg_channels, cfg_interval):
    """Returns denoise(x, t) -> noise, variance code for labels y (N,), with guidance.

    cfg_scale 1 means no guidance. cfg_channels 0 guides all channels. Only steps in cfg_interval
    are guided and evaluate the null label.
    """
    channels, null = cfg_channels or model.in_channels, torch.full_like(y, model.num_classes)

    def run(x, t, y):
        steps = torch.full((len(x),), t, device=x.device)
        out = model(x, steps, y).float()
        noise, code = out[:, : model.in_channels], out[:, model.in_channels :]
        return noise, code if code.shape[1] else None

    def denoise(x, t):
        if cfg_scale == 1 or not cfg_interval[0] <= t <= cfg_interval[1]:
            return run(x, t, y)
        noise, code = run(torch.cat([x, x]), t, torch.cat([y, null]))
        noise, null_noise = noise.chunk(2)
        mixed = null_noise + cfg_scale * (noise - null_noise)
        noise = torch.cat([mixed[:, :channels], noise[:, channels:]], dim=1)
        return noise, None if code is None else code[: len(x)]

    return denoise


RULES = {  # option of `Sampler.sample`: (rule in words, check(value, model))
    "sampler": ("ddpm or ddim", lambda x, _: x in SAMPLERS),
    "num_steps": (
        "a count such as 250 or ddim50",
        lambda x, _: re.fullmatch(r"(ddim)?\d+", str(x)),
    ),
    "eta": ("in 0 .. 1", lambda x, _: 0 <= x <= 1),
    "clip_x0": ("True or False", lambda x, _: x in (True, False)),
    "cfg_scale": (
        "1, or at least 0 if the model has a null label",
        lambda x, m: x == 1 or m.null_label and 0 <= x < math.inf,
    ),
    "cfg_channels": (
        "0 or a number of channels of the model",
        lambda x, m: type(x) is int and 0 <= x <= m.in_channels,
    ),
    "cfg_interval": (
        "two steps in ascending order",
        lambda x, _: len(x) == 2 and 0 <= x[0] <= x[1],
    ),
}


class Sampler:
    """A DiT with its diffusion and its sampling options; `load` returns one."""

    def __init__(self, model, config):
        self.model, self.config = model, config

    @torch.no_grad()
    def sample(self, labels, *, seed=0, noise=None, **sampling):
        """Returns one image per label.

        A pixel model returns uint8 images (N, H, W, C), a latent model latents (N, C, H, W).
        noise (S + 1, N, C, H, W) replaces the noise of the seed: step i uses noise[i], and the last
        one is x_T. `sampling` overrides `config["sampling"]`.
        """
        options = self.config["sampling"] | sampling
        device = self.model.pos_embed.device
        y = torch.as_tensor(self._check(labels, options), device=device)
        shape = (len(y), self.model.in_channels, *self.model.input_size)
        generator = torch.Generator(device).manual_seed(seed)

        def draw(i):
            if noise is not None:
                return torch.as_tensor(noise[i], dtype=torch.float32, device=device)
            return torch.randn(shape, generator=generator, device=device)

        alpha_bar, timestep = make_schedule(
            **self.config["diffusion"], spacing=options["num_steps"]
        )
        expected = (len(alpha_bar) + 1, *shape)
        if noise is not None and np.shape(noise) != expected:
            raise ValueError(f"noise must have shape {expected}, got {np.shape(noise)}")
        guidance = {name: x for name, x in options.items() if name.startswith("cfg_")}
        denoise = make_denoiser(self.model, y, **guidance)
        sampler, extra = SAMPLERS[options["sampler"]], {"clip_x0": options["clip_x0"]}
        if sampler is ddim:
            extra["eta"] = options["eta"]
        x = sampler(denoise, draw(len(alpha_bar)), alpha_bar, timestep, noise=draw, **extra)
        if self.config["space"] == "latents":
            return x
        x = (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return x.permute(0, 2, 3, 1).cpu().numpy()

    def _check(self, labels, options):
        """Returns the labels as int64 (N,). ValueError if a label or an option is invalid."""
        y, classes = np.asarray(labels), self.model.num_classes
        if y.ndim != 1 or not y.size:
            raise ValueError(f"labels must be a list of integers, got {labels!r}")
        if wrong := set(y.tolist()) - set(range(classes)):
            first = min(wrong, key=str)
            raise ValueError(f"labels must be integers in 0 .. {classes - 1}, got {first!r}")
        for name, value in options.items():
            if name not in RULES:
                raise ValueError(f"option must be one of {', '.join(RULES)}, got {name}")
            rule, check = RULES[name]
            try:
                valid = check(value, self.model)
            except (TypeError, IndexError, ValueError):
                valid = False
            if not valid:
                raise ValueError(f"{name} must be {rule}, got {value!r}")
        return y.astype(np.int64)


def load(path, device="cpu"):
    """Returns the Sampler of a bundle: a folder with config.json and model.safetensors."""
    from safetensors.torch import load_file

    config = json.loads((Path(path) / "config.json").read_text())
    if "space" not in config:
        raise ValueError(f"path must be the folder of a bundle, got {path}")
    model = DiT(**config["model"])
    model.load_state_dict(load_file(Path(path) / "model.safetensors"))
    return Sampler(model.to(device).eval(), config)
