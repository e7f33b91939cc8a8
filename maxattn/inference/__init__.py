"""`optimize_for_inference`: a network that computes what a plain one does, faster, and can do nothing else."""

from __future__ import annotations

import copy
from typing import Literal

from torch import nn

from maxattn.inference.network import InferenceMaxViT
from maxattn.nn import MaxViT

__all__ = ["InferenceMaxViT", "optimize_for_inference"]


def optimize_for_inference(
    model: nn.Module,
    *,
    compile: bool | Literal["max-autotune"] = False,
) -> InferenceMaxViT:
    """A new network for inference alone that computes what `model` does in eval mode, faster; `model` stays as it is.

    Batch norms, the weights of layer norms and layer scales are folded into the convolutions and Linears beside them,
    in fp64; relative position biases are gathered; dropout and stochastic depth are gone. On the CPU, convolutions and
    Linears run in oneDNN with packed weights and the activation inside, "same" padding copies nothing, and few images
    at a time go through a stage of a large batch. On an NVIDIA GPU in fp16 and bf16, where triton is installed, kernels
    of our own fuse what lies between the products: norms, gates, residuals, MBConv's pooling. Outputs differ from the
    plain network's by rounding. Make it from the fp32 model and move the result to its device and dtype: weights are
    rounded once then. To compile it, call this function on it again.

    Args:
        model: what `maxattn.build` made, of any spec; or a result of this function, which is copied.
        compile: for the device and dtype that `model` has. False: nothing is compiled, any size runs at once. True: on
            the CPU, `torch.compile` compiles each stage with its weights frozen. On a GPU `forward` alone is replayed
            as a CUDA graph: of our kernels where they serve and MBConvs fuse, which takes moments to record, else of
            what `torch.compile` makes. "max-autotune": `torch.compile` in any case, and each matrix product takes the
            fastest of several kernels, which lengthens compilation. Every new size of image or batch is compiled or
            recorded at its first call, which takes up to minutes where it is compiled; where sizes vary, leave it off.

    Returns:
        An `InferenceMaxViT`: `forward`, `forward_features`, `forward_head` and `features` as before. What would train
        or change it raises RuntimeError. `maxattn.save_weights` and `maxattn.open_model` keep it as it is, though not
        compiled: call this function on it again.

    Raises:
        TypeError: for a model of another type, or for one wrapped by `torch.compile` or data parallelism.
        ValueError: for another value of `compile`.

    Example:
        >>> import torch, maxattn
        >>> model, x = maxattn.build("nano").eval(), torch.randn(2, 3, 28, 28)
        >>> fast = maxattn.optimize_for_inference(model)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    if compile not in (False, True, "max-autotune"):
        raise ValueError(f"compile must be False, True or 'max-autotune', not {compile!r}")
    if not isinstance(model, MaxViT):
        raise TypeError(f"the model must be one that maxattn.build made, not wrapped, not {type(model).__name__}")
    optimized = copy.deepcopy(model) if isinstance(model, InferenceMaxViT) else InferenceMaxViT(model)
    if compile:
        optimized.compile_for_device(autotune=compile == "max-autotune")
    return optimized
