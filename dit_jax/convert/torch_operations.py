"""The operations of a DiT's block in PyTorch, eager, for `dit-bench operations --peer`.

Shapes: N batch, T tokens, D hidden size, K heads.
"""

import torch
from torch.nn import functional

from dit_jax.convert import torch_peer


def make(name, arrays, *, dtype):
    """Returns run(): an operation with the gradients of its inputs, then a synchronisation.

    arrays: as of `runs.operations.draw`, NumPy. run() returns (the output, [each gradient]) as
    tensors in the layout of the arrays. dtype: of the arithmetic on a GPU; on a CPU it is float32.
    """
    device = torch_peer.find_device()
    *inputs, grad = (torch.from_numpy(x).to(device) for x in arrays)
    if dtype == "bfloat16" and device.type == "cuda":
        *inputs, grad = (x.bfloat16() for x in (*inputs, grad))
    is_linear = name not in APPLY
    if is_linear:  # PyTorch's weights are (outputs, inputs)
        inputs[1] = inputs[1].t().contiguous()
    inputs = [x.requires_grad_() for x in inputs]
    apply = APPLY.get(name, functional.linear)

    def run():
        out = apply(*inputs)
        grads = list(torch.autograd.grad(out, inputs, grad))
        torch_peer.wait(device)
        if is_linear:
            grads[1] = grads[1].t()
        return out, grads

    return run


def make_update(model, *, learning_rate, ema_decay):
    """Returns run(): fused AdamW of all parameters, and their EMA, then a synchronisation."""
    device, net = torch_peer.on_device(model)
    params = [x for x in net.parameters() if x.requires_grad]
    for x in params:
        x.grad = 0.1 * x.detach()
    update = torch_peer.make_update(params, learning_rate=learning_rate, ema_decay=ema_decay)

    def run():
        update()
        torch_peer.wait(device)

    return run


def _normalise(x, shift, scale):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _attend(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (N, K, T, D/K)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # as given


def _gelu(x):
    return functional.gelu(x, approximate="tanh")


def _add(x, gate, y):
    return x + gate * y


# Every other operation is a linear.
APPLY = {"norm": _normalise, "attention": _attend, "gelu": _gelu, "residual": _add}
