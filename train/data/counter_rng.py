"""Counter-based random numbers: each is a function of its purpose, so nothing depends on the order of calls.

B counters, K numbers each.
"""

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # of splitmix64: shift, then factor


def uniform(number_B: torch.Tensor, count: int, *keys: int) -> torch.Tensor:
    """`count` uniform numbers in [0, 1) for each int64, float64 [count, B]; a function of the keys and the int64.

    The generator is splitmix64 (Steele, Lea, Flood 2014), seeded by a hash of the keys and the number.
    """
    seed = 0
    for key in keys:
        seed = _mix_int(seed + key)
    seed_B = _mix(number_B + _signed(seed))
    place_K = torch.arange(1, count + 1, device=number_B.device)
    bits_KB = _mix(seed_B + place_K[:, None] * _signed(_GOLDEN))
    return (bits_KB >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _mix(number: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser of each int64; sums and products wrap around."""
    for shift, factor in _STEPS:
        number = (number ^ (number >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return number


def _mix_int(number: int) -> int:
    number = (number + _GOLDEN) % 2**64
    for shift, factor in _STEPS:
        number = (number ^ number >> shift) * factor % 2**64
    return number


def _signed(number: int) -> int:
    """Signed 64-bit integer with the same bits."""
    return (number + 2**63) % 2**64 - 2**63
