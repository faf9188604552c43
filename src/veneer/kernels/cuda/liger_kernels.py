"""Norms, gates, rotations and the loss from logits on CUDA, by liger-kernel's Triton kernels.

    norm      y = weight * (x / sqrt(mean(x^2) + epsilon)), rounded after the division (Llama's way)
    gate      y = silu(gate) * up, or gelu(gate) * up with gelu's tanh
    rotation  y = x cos + turned(x) sin, the halves of cos and of sin being equal
    loss      -log softmax(z)[target], and in the place of z its gradient

liger-kernel writes some results over its inputs. Callers here keep their inputs: gates in backward
and rotations work on copies. The loss calls the kernel itself. liger's `cross_entropy_forward`
would round each loss to the type of the logits, and wait for the device three times a call.

While a step is planned tensors have no storage (meta): nothing is launched, and as much is
allocated. Tried with liger-kernel 0.8.5. Shapes: M rows, D width, H heads, V vocabulary.
"""

import torch
import triton
from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel
from liger_kernel.ops.geglu import geglu_backward, geglu_forward
from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward
from liger_kernel.ops.rope import rope_backward, rope_forward
from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
from liger_kernel.ops.utils import calculate_settings
from torch import Tensor

_LLAMA_CASTING = 0
"""What `rms_norm_forward` makes of "llama": the rows are rounded before they meet the weight."""
_ENTROPY_WARPS = 32


def norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Normalises: x (..., D), weight (D) -> y, and the float32 factor of each row (M)."""
    if x.is_meta:
        rows = x.numel() // x.shape[-1]
        return torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    y, _, scale, *_ = rms_norm_forward(x, weight, epsilon, 0.0, _LLAMA_CASTING, None)
    return y, scale


def norm_backward(
    x: Tensor, weight: Tensor, grad: Tensor, scale: Tensor, *, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradient of x, and that of the weight if it is needed."""
    if x.is_meta:
        return torch.empty_like(x), torch.empty_like(weight) if needs_weight else None
    block, warps = calculate_settings(x.shape[-1])
    rows = x.view(-1, x.shape[-1])
    settings = (0.0, _LLAMA_CASTING, block, warps, False, None, needs_weight)
    return rms_norm_backward(grad, rows, weight, scale, *settings)


def gate_forward(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """Multiplies: gate and up of one shape and type -> the gated values."""
    if gate.is_meta:
        return torch.empty_like(gate)
    return (geglu_forward if gelu else swiglu_forward)(gate, up)[2]


def gate_backward(gate: Tensor, up: Tensor, grad: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Returns the gradients of gate and up, each in a new tensor."""
    copies = gate.clone(), up.clone()
    if gate.is_meta:
        return copies
    return (geglu_backward if gelu else swiglu_backward)(*copies, grad)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    """Rotates q (M, H, D) and k (M, K, D) by cos and sin (M, D), or back."""
    copies = q.clone(), k.clone()
    if q.is_meta:
        return copies
    with torch.cuda.device_of(q):
        turned = (rope_backward if back else rope_forward)(
            *(copy[None].transpose(1, 2) for copy in copies), cos, sin
        )
    return turned[0].transpose(1, 2)[0], turned[1].transpose(1, 2)[0]


def entropy(z: Tensor, targets: Tensor, writes: bool) -> Tensor:
    """Computes cross-entropy: z (at least M, V), targets (M) int64 -> losses (M) float32; `writes`
    makes z its gradient.

    The kernel reads z at each target without a check. A target outside of z makes its loss nan,
    which stops the run.
    """
    width = z.shape[1]
    losses = torch.empty(len(targets), dtype=torch.float32, device=z.device)
    valid = (targets >= 0) & (targets < width)
    readable = torch.where(valid, targets, 0)
    if not z.is_meta:
        with torch.cuda.device_of(z):
            liger_cross_entropy_kernel[(len(targets),)](
                X_ptr=z,
                X_stride=z.stride(0),
                Y_ptr=readable,
                Y_stride=1,
                weight_ptr=None,
                loss_ptr=losses,
                z_loss_ptr=None,
                loss_stride=1,
                token_accuracy_ptr=None,
                token_accuracy_stride=0,
                predicted_tokens_ptr=None,
                predicted_tokens_stride=0,
                n_cols=width,
                n_non_ignore=len(targets),
                sum_non_ignore_weight=len(targets),
                weight_sum=0.0,
                ignore_index=-1,
                lse_square_scale=0.0,
                label_smoothing=0.0,
                reduction="none",
                softcap=None,
                RETURN_Z_LOSS=False,
                RETURN_TOKEN_ACCURACY=False,
                RETURN_PREDICTED_TOKENS=False,
                BLOCK_SIZE=min(MAX_FUSED_SIZE, triton.next_power_of_2(width)),
                HAS_WEIGHT=False,
                HAS_SOFTCAPPING=False,
                HAS_GRADIENTS=writes,
                num_warps=_ENTROPY_WARPS,
            )
    return torch.where(valid, losses, float("nan"))
