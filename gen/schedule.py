"""Numbers that change while training, as functions of the images seen, so that resuming needs no memory of them."""

from __future__ import annotations

import math


def cosine(end: float, over: int, images_seen: int) -> float:
    """What a setting is multiplied by in the step that begins at `images_seen`: from 1 to `end` along half a cosine
    (Loshchilov & Hutter 2017) over the first `over` images, then `end`.

    Args:
        over: 0 for a factor of 1 throughout.
    """
    if not over:
        return 1.0
    progress = min(1.0, images_seen / over)
    return end + (1.0 - end) * (1.0 + math.cos(math.pi * progress)) / 2
