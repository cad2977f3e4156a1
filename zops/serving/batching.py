"""How many pictures of a shape to make at once: what was measured to pay, and what fits into memory."""

from zops.serving.messages import Ready, Shape

LARGEST_BATCH = 16
MEASURED: dict[tuple[str, str], tuple[tuple[int, int], ...]] = {
    # One H200, 8 forwards, text encoder included; images/s alone, in fours, in eights at 512x512:
    # fp8 7.08, 8.82, 9.02; bf16 5.17, 5.51, 5.65. At 1024x1024 fp8 makes 1.87 alone and 1.97 in fours: 5 % more images
    # for four times the wait, so pictures of that size are made one by one.
    ("NVIDIA H200", "fp8"): ((512 * 512, 8),),
    ("NVIDIA H200", "bf16"): ((512 * 512, 4),),
}
"""By device and preset: (pixels, largest batch that pays up to so many pixels), ascending; beyond the last: 1."""
MEMORY_SHARE = 0.9
"""Of the free memory; the rest is for what the allocator cannot use."""
LINGER_S = 0.004
"""Longest that a picture waits for others to be made with it; the shortest batch that pays takes 50 times as long."""
CROWD_S = 0.5
"""How long after the end of a batch its clients are expected to come back, with time to encode and send its images."""


def largest_batch(shape: Shape, facts: Ready, chosen: int | None = None) -> int:
    """Return how many pictures of a shape a worker may be given at once, at least 1.

    Args:
        shape: what is to be made.
        facts: what the worker runs on; for a device or preset that was not measured the answer is 1.
        chosen: the operator's own limit in place of the measured one.
    """
    pays = _measured(facts, shape.width * shape.height) if chosen is None else chosen
    return max(1, min(pays, LARGEST_BATCH, _fitting(shape, facts)))


def _measured(facts: Ready, pixels: int) -> int:
    return next((batch for most, batch in MEASURED.get((facts.device, facts.preset), ()) if pixels <= most), 1)


def _fitting(shape: Shape, facts: Ready) -> int:
    if facts.memory_free is None or not facts.pixel_bytes:
        return LARGEST_BATCH
    # With guidance each picture goes through the transformer twice, side by side.
    rows = 2 if shape.guidance_scale > 0 else 1
    return int(facts.memory_free * MEMORY_SHARE / (shape.width * shape.height * facts.pixel_bytes * rows))
