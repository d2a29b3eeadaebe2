"""Training, sampling and an autoencoder in PyTorch: what `dit-bench --peer` compares with ours.

It is tuned as PyTorch users do: scaled-dot-product attention, fused AdamW, the EMA in one foreach
call, bfloat16 autocast on a GPU; eager or with torch.compile. The formulas repeat those of
`dit_jax.diffusion` on purpose, as an independent implementation.
Shapes: N batch, C channels, H W grid, S steps.
"""

import functools

import numpy as np
import torch

from dit_jax.convert import torch_dit, torch_model, torch_vae

LOG_2 = float(np.log(2))


def make_train_step(model, diffusion, *, batch_size, dtype, learning_rate, ema_decay, compiled):
    """Returns run(): one training step on a fixed batch on the device, then a synchronisation."""
    device, net = on_device(model)
    params = [x for x in net.parameters() if x.requires_grad]
    update = make_update(params, learning_rate=learning_rate, ema_decay=ema_decay)
    forward = torch.compile(net) if compiled else net
    tables = make_tables(diffusion, device)
    x0 = torch.randn(batch_size, model.in_channels, *model.input_size, device=device)
    labels = torch.arange(batch_size, device=device) % model.num_classes

    def run():
        t = torch.randint(len(tables["beta"]), (batch_size,), device=device)
        noise = torch.randn_like(x0)
        dropped = torch.rand(batch_size, device=device) < 0.1
        y = torch.where(dropped, model.num_classes, labels) if model.null_label else labels
        x_t = _at(tables["signal"], t) * x0 + _at(tables["sigma"], t) * noise
        with _autocast(device, dtype):
            out = forward(x_t, t, y)
        loss = objective(tables, out.float(), x0=x0, x_t=x_t, t=t, noise=noise)
        loss.backward()
        update()
        for x in params:
            x.grad = None
        wait(device)
        return loss.item()

    return run


def make_update(params, *, learning_rate, ema_decay):
    """Returns update(): fused AdamW of the parameters by their gradients, then their EMA."""
    average = [x.detach().clone() for x in params]
    optimizer = torch.optim.AdamW(params, lr=learning_rate, weight_decay=0.0, fused=True)

    def update():
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - ema_decay)

    return update


def make_sampling(model, diffusion, sampling, *, batch_size, dtype, compiled):
    """Returns run(): samples one batch from noise to x_0, then synchronises."""
    device, net = on_device(model)
    net = net.eval().requires_grad_(False)
    options = {name: sampling[name] for name in torch_model.RULES}
    settings = {"diffusion": diffusion, "sampling": options, "space": "latents"}
    sampler = torch_model.Sampler(net, settings)
    if compiled:
        net.forward = torch.compile(net.forward)
    labels = np.arange(batch_size) % model.num_classes

    def run():
        with _autocast(device, dtype):
            sampler.sample(labels)
        wait(device)

    return run


def make_autoencoder(config, what, *, size, batch_size, dtype, compiled):
    """Returns run(): encodes or decodes ("encode", "decode") a batch, then synchronises.

    config: a VAEConfig. size: (H, W) of the images. diffusers' AutoencoderKL, with float32
    convolutions as exact as ours.
    """
    device = find_device()
    torch.backends.cudnn.allow_tf32 = False
    net = torch_vae.build_diffusers(config).to(device, memory_format=torch.channels_last)
    net = net.eval().requires_grad_(False)

    def encode(images):
        return net.encode(images.float() / 127.5 - 1).latent_dist.parameters

    def decode(latents):
        return ((net.decode(latents).sample.float() + 1) * 127.5).round().clamp(0, 255).byte()

    apply = encode if what == "encode" else decode
    apply = torch.compile(apply) if compiled else apply
    height, width = size
    if what == "encode":
        shape = (batch_size, config.in_channels, height, width)
        x = torch.randint(256, shape, dtype=torch.uint8, device=device)
    else:
        factor = config.downsampling
        shape = (batch_size, config.latent_channels, height // factor, width // factor)
        x = torch.randn(shape, device=device)

    def run():
        with torch.no_grad(), _autocast(device, dtype):
            out = apply(x)
        wait(device)
        return out

    return run


def objective(tables, out, *, x0, x_t, t, noise):
    """The loss of the paper, as in `diffusion.losses.objective`, averaged over the batch."""
    channels = x0.shape[1]
    predicted, code = out[:, :channels], out[:, channels:]
    mse = (predicted - noise).square().mean()
    if not code.shape[1]:
        return mse
    at = functools.partial(_at, t=t)
    share, smallest = (code + 1) / 2, at(tables["posterior_log_variance"])
    log_variance = share * at(tables["log_beta"]) + (1 - share) * smallest
    x0_share, x_share = at(tables["x0_share"]), at(tables["x_share"])
    implied = at(tables["reciprocal"]) * x_t - at(tables["rest"]) * predicted.detach()
    mean, true_mean = x0_share * implied + x_share * x_t, x0_share * x0 + x_share * x_t
    kl = 0.5 * (
        log_variance
        - smallest
        - 1
        + torch.exp(smallest - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    inverse_sigma = torch.exp(-0.5 * log_variance)
    above = _normal_cdf(inverse_sigma * (x0 - mean + 1 / 255))
    below = _normal_cdf(inverse_sigma * (x0 - mean - 1 / 255))
    inside = torch.where(x0 > 0.999, 1 - below, above - below)
    nll = -torch.where(x0 < -0.999, above, inside).clamp(min=1e-12).log()
    bound = torch.where(t == 0, nll.mean(dim=(1, 2, 3)), kl.mean(dim=(1, 2, 3))) / LOG_2
    return mse + bound.mean()


def _normal_cdf(x):
    return 0.5 * (1 + torch.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def make_tables(diffusion, device):
    """Returns float32 tables (S,) over the steps of the diffusion."""
    alpha_bar, _ = torch_model.make_schedule(**diffusion, spacing=diffusion["num_steps"])
    alpha_bar = np.array(alpha_bar)
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    tables = {
        "beta": beta,
        "signal": np.sqrt(alpha_bar),
        "sigma": np.sqrt(1 - alpha_bar),
        "reciprocal": np.sqrt(1 / alpha_bar),
        "rest": np.sqrt(1 / alpha_bar - 1),
        "log_beta": np.log(beta),
        "posterior_log_variance": np.log(np.append(variance[1], variance[1:])),
        "x0_share": beta * np.sqrt(before) / (1 - alpha_bar),
        "x_share": (1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar),
    }
    return {name: torch.tensor(x, dtype=torch.float32, device=device) for name, x in tables.items()}


def _at(table, t):
    return table[t].view(-1, 1, 1, 1)


def find_device():
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(model):
    """(the device, a random DiT of a DiTConfig on it)."""
    device = find_device()
    return device, torch_model.DiT(**torch_dit.fields(model)).to(device)


def _autocast(device, dtype):
    """bfloat16 autocast if the config asks for bfloat16 and the device is a GPU."""
    enabled = device.type == "cuda" and dtype == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def wait(device):
    """Waits until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
