"""How a run is split: steps, ranks, micro-batches, and how blocks are computed."""

from dataclasses import dataclass

from train.scale.activation_checkpointing import Mode


@dataclass(frozen=True)
class Plan:
    """How a run is cut up, and how its machine carries it out."""

    steps: int
    per_epoch: int
    """Steps an epoch."""
    world: int = 1
    """Processes, a device each."""
    accumulate: int = 1
    """Micro-batches a step on each device."""
    recompute: Mode = "none"
    compile: bool = False
    fused: bool = False
    """Whether the optimizer is one kernel."""
    head_steps: int = 0
    """At the start, in which the head alone trains."""
