"""Activation checkpointing by block: the backward pass recomputes activations instead of storing them.

none: store all. selective: store outputs of matmuls and attention, recompute the rest. full: store block inputs only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Mode = Literal["none", "selective", "full"]

_aten = torch.ops.aten
_STORED = {
    getattr(_aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}


def apply(blocks: Sequence[nn.Module], mode: Mode) -> int:
    """Set the activation-checkpointing mode of `blocks`, bottom first, in place of an earlier mode.

    Parameter names, gradients and statistics do not change: the recomputation repeats random numbers, and batch norms
    count once. Blocks below the first trainable one store nothing and do not change, so freeze layers before. Call
    `block.compile()` after it.

    Returns:
        Number of checkpointed blocks.
    """
    for block in blocks:
        block.__dict__.pop("forward", None)
    if mode == "none":
        return 0
    trained = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    first = trained.index(True) if any(trained) else len(blocks)
    for block in blocks[first:]:
        if mode == "selective":
            for module in block.modules():
                if getattr(module, "inplace", False) is True:  # of activations and dropout
                    module.__dict__["inplace"] = False  # stored activations must not be overwritten
        block.forward = _checkpointed(block, mode)
    return len(blocks) - first


def _checkpointed(block: nn.Module, mode: Mode) -> Callable[..., Any]:
    forward = block.forward
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    selective = partial(create_selective_checkpoint_contexts, _policy)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, recomputation = selective() if mode == "selective" else (nullcontext(), nullcontext())
        return first, _frozen_statistics(norms, recomputation)

    # compiled code updates statistics once anyway, and accepts only torch's own contexts
    compiled = {"context_fn": selective} if mode == "selective" else {}
    eager = {"context_fn": contexts} if norms else compiled

    def computed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        cfg = compiled if torch.compiler.is_compiling() else eager
        return checkpoint(forward, *args, use_reentrant=False, **cfg, **kwargs)

    return computed


@contextmanager
def _frozen_statistics(norms: list[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Leave running statistics of batch norms unchanged during recomputation."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        with inner:
            yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001
    return CheckpointPolicy.MUST_SAVE if operator in _STORED else CheckpointPolicy.PREFER_RECOMPUTE
