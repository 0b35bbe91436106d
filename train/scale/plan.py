"""Plan of a run: steps, ranks, micro-batches, activation checkpointing and compilation."""

from dataclasses import dataclass

from train.scale.activation_checkpointing import Mode


@dataclass(frozen=True)
class Plan:
    """Steps, ranks, micro-batches, activation checkpointing and compilation of a run."""

    steps: int
    """Number of optimizer steps."""
    per_epoch: int
    """Optimizer steps per epoch."""
    world: int = 1
    """Number of processes, one per device."""
    accumulate: int = 1
    """Micro-batches per step on each device."""
    activation_checkpointing: Mode = "none"
    compile: bool = False
    """Whether torch.compile compiles the blocks."""
    fused: bool = False
    """Whether the optimizer runs as one fused kernel."""
    head_steps: int = 0
    """Number of steps at the start in which only the head trains."""
