"""FLOPs of one image of Stable Diffusion 2, counted without rendering."""

# Forward TFLOP (a multiply-add is 2) at 96×96 latents, counted with torch's FlopCounterMode; a test counts them again.
# The first value grows with the pixels (convolutions, linear layers), the second with their square (self-attention).
UNET_TFLOP = (1.5380, 0.6112)  # one evaluation; a guided step takes two
SHALLOW_TFLOP = (0.4464, 0.5424)  # one with the deep features of an earlier step
DECODER_TFLOP = (5.5804, 0.1740)


def evaluations(steps: int, guidance: float, guided_fraction: float) -> tuple[int, int]:
    """Count the guided and unguided steps of an image; guidance 1 disables guidance."""
    guided = 0 if guidance == 1 else round(guided_fraction * steps)
    return guided, steps - guided


def tflop_per_image(
    steps: int = 50,
    render_size: int = 768,
    guidance: float = 9.0,
    guided_fraction: float = 1.0,
    cache_every: int = 1,
) -> float:
    """Compute the forward TFLOP of one image at `render_size` pixels a side: its steps and the decoding.

    221 for 50 guided steps at 768; the text tower's 0.1 is left out.
    """
    area = (render_size / 768) ** 2
    unet, shallow, decoder = (
        linear * area + square * area**2 for linear, square in (UNET_TFLOP, SHALLOW_TFLOP, DECODER_TFLOP)
    )
    guided, _ = evaluations(steps, guidance, guided_fraction)
    total = decoder
    for step in range(steps):
        total += (2 if step < guided else 1) * (unet if step % cache_every == 0 else shallow)
    return total
