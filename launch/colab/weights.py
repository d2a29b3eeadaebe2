"""The weights that notebooks begin with: published ones, or random ones in the same formats."""

from dit_jax.errors import UserError
from launch.colab import start

ADDRESS = "https://dl.fbaipublicfiles.com/DiT/models/"
OFFICIAL = ("DiT-XL-2-256x256", "DiT-XL-2-512x512")
SMALL = {
    "input_size": (8, 8),  # images of 64 pixels
    "patch_size": 2,
    "in_channels": 4,
    "depth": 4,
    "hidden_size": 128,
    "num_heads": 4,
    "num_classes": 1000,
    "null_label": True,
    "learn_sigma": True,
    "conditioning": "adaln_zero",
}


def checkpoint(name, folder, *, smoke):
    """The checkpoint that a form names: one in OFFICIAL, converted, or the folder of a run.

    folder: where conversions are. smoke: of `official`. Failed or UserError if there is none.
    """
    from dit_jax.sampling import fields

    name = name.strip()
    if name not in OFFICIAL:
        path = start.find(name)
        if not name or not path.is_dir():
            raise start.Failed(
                f"a checkpoint must be {', '.join(OFFICIAL)} or the folder of a run, got "
                f"{name!r}, which is not there: {path}"
            )
        fields.look(path)
        return path
    path = folder / name
    if not path.exists():
        file = official(name, folder, smoke=smoke)
        start.run("dit-convert", "from-torch", file, path, "--class_names=imagenet", device="cpu")
    return path


def official(name, folder, *, smoke):
    """The file NAME.pt of the authors, such as DiT-XL-2-256x256, in a folder.

    smoke: a small DiT with random weights in the same format instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    if not smoke:
        return start.download(f"{ADDRESS}{name}.pt", path)
    if not path.exists():
        _write_dit(path)
    return path


def autoencoder(name, folder, *, smoke):
    """The folder of an autoencoder of the Hugging Face hub, such as stabilityai/sd-vae-ft-ema.

    smoke: a small one with random weights in the same format instead. Failed if it cannot be had.
    """
    from dit_jax.convert import torch_vae

    if not smoke:
        try:
            return torch_vae.download(name)
        except UserError as error:
            raise start.Failed(f"{error}. {start.OFFER}") from None
    path = folder / "random_autoencoder"
    if not path.exists():
        _write_autoencoder(path)
    return path


def _write_dit(path):
    import torch

    from dit_jax.convert import torch_model

    torch.manual_seed(0)
    model = torch_model.DiT(**SMALL)
    with torch.no_grad():
        for parameter in (x for x in model.parameters() if x.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save(model.state_dict(), path)


def _write_autoencoder(path):
    import diffusers
    import torch

    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4,  # 8 times smaller, like Stable Diffusion's
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
    ).save_pretrained(path)
