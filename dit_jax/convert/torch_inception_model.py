"""Inception-v3 of 2015-12-05 in PyTorch, as pytorch-fid and torch-fidelity have it.

The parity check compares ours with it. It repeats the network on purpose, from the tensors of the
weights file and with their batch norms, as an independent implementation.
Shapes: N batch, C channels, H W grid.
"""

import torch
import torch.nn.functional as F

SIZE = 299


def features(tensors, images):
    """(pool (N, 2048), spatial (N, 2023), logits (N, 1008)) of uint8 images (N, H, W, 3).

    tensors: {name: float32 tensor} of the weights file.
    """
    net = Net(tensors)
    with torch.no_grad():
        x = resize(torch.as_tensor(images).permute(0, 3, 1, 2).float())
        at_17, at_8 = net((x - 128) / 128)
        pool = at_8.mean(dim=(2, 3))
        spatial = at_17[:, :7].permute(0, 2, 3, 1).flatten(1)  # channel fastest
        return pool, spatial, pool @ tensors["fc.weight"].T


def resize(x):
    """float32 (N, C, H, W) -> (N, C, 299, 299): TensorFlow 1's bilinear, without antialiasing."""
    for axis in (3, 2):
        size = x.shape[axis]
        source = torch.arange(SIZE).float() * (torch.tensor(float(size)) / SIZE)
        low = source.floor().long()
        shape = [-1 if each == axis else 1 for each in range(4)]
        below = x.index_select(axis, low)
        above = x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = below + (above - below) * (source - low).reshape(shape)
    return x


def average_pool(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Net:
    """The convolutional part; a name stands for a convolution, its batch norm and ReLU."""

    def __init__(self, tensors):
        self.tensors = tensors

    def conv(self, name, x, *, stride=1, padded=True):
        weight = self.tensors[f"{name}.conv.weight"]
        padding = [size // 2 if padded else 0 for size in weight.shape[2:]]
        x = F.conv2d(x, weight, stride=stride, padding=padding)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.relu(F.batch_norm(x, *(self.tensors[f"{name}.bn.{n}"] for n in names), eps=1e-3))

    def chain(self, block, x, *names, last=None):
        """Convolutions of a block, one after another; last: options of the last one."""
        for i, name in enumerate(names):
            options = last if last and i == len(names) - 1 else {}
            x = self.conv(f"{block}.{name}", x, **options)
        return x

    def pair(self, block, x, *names):
        return [self.conv(f"{block}.{name}", x) for name in names]

    def __call__(self, x):
        """x (N, 3, 299, 299) -> outputs of Mixed_6d (N, 768, 17, 17), Mixed_7c (N, 2048, 8, 8)."""
        x = self.conv("Conv2d_1a_3x3", x, stride=2, padded=False)
        x = self.conv("Conv2d_2a_3x3", x, padded=False)
        x = F.max_pool2d(self.conv("Conv2d_2b_3x3", x), 3, stride=2)
        x = self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", x), padded=False)
        x = F.max_pool2d(x, 3, stride=2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.at_35(block, x)
        x = self.to_17("Mixed_6a", x)
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d"):
            x = self.at_17(block, x)
        mixed_6d, x = x, self.at_17("Mixed_6e", x)
        x = self.at_8("Mixed_7b", self.to_8("Mixed_7a", x), average_pool)
        return mixed_6d, self.at_8("Mixed_7c", x, lambda x: F.max_pool2d(x, 3, 1, padding=1))

    def at_35(self, block, x):
        branches = [
            self.chain(block, x, "branch1x1"),
            self.chain(block, x, "branch5x5_1", "branch5x5_2"),
            self.chain(block, x, *(f"branch3x3dbl_{i}" for i in (1, 2, 3))),
            self.chain(block, average_pool(x), "branch_pool"),
        ]
        return torch.cat(branches, dim=1)

    def to_17(self, block, x):
        halve = {"stride": 2, "padded": False}
        branches = [
            self.chain(block, x, "branch3x3", last=halve),
            self.chain(block, x, *(f"branch3x3dbl_{i}" for i in (1, 2, 3)), last=halve),
            F.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)

    def at_17(self, block, x):
        branches = [
            self.chain(block, x, "branch1x1"),
            self.chain(block, x, *(f"branch7x7_{i}" for i in (1, 2, 3))),
            self.chain(block, x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
            self.chain(block, average_pool(x), "branch_pool"),
        ]
        return torch.cat(branches, dim=1)

    def to_8(self, block, x):
        halve = {"stride": 2, "padded": False}
        branches = [
            self.chain(block, x, "branch3x3_1", "branch3x3_2", last=halve),
            self.chain(block, x, *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)), last=halve),
            F.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)

    def at_8(self, block, x, pool):
        y = self.chain(block, x, "branch3x3_1")
        z = self.chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2")
        branches = [
            self.chain(block, x, "branch1x1"),
            *self.pair(block, y, "branch3x3_2a", "branch3x3_2b"),
            *self.pair(block, z, "branch3x3dbl_3a", "branch3x3dbl_3b"),
            self.chain(block, pool(x), "branch_pool"),
        ]
        return torch.cat(branches, dim=1)
