"""Batches on the device: a rank's share of a step, all microbatches of it, prepared one step ahead (train/ahead.py).

Between two steps there are three: of the step whose numbers nobody has read yet (it is done again from its batch where it was
refused), of the one that was issued, and of the next. On a GPU they are memory of a stream of their own, and the allocator gives a
batch's memory again only when the step after it is done: a fourth. An image of each is

    latents      4 bytes a value, whatever the shards hold
    text         the features as the encoder or the shards give them, and a mask of 1 byte a token
    position     8 bytes

and the one that is being prepared is, before it has its text, two copies of the latents (shifted, and scaled), or where
a codec runs three of them and the pictures. What else a running encoder needs while it works is not counted.
"""

from __future__ import annotations

from ecdit_train.config.schema import RunConfig

from . import slots
from .layout import Layout

AT_ONCE = 3
"""Batches that somebody holds."""
GIVEN_BACK = 1
"""And those that a GPU's allocator keeps until work that was issued before is done."""


def prepared_batches(cfg: RunConfig, layout: Layout) -> float:
    """Bytes on one rank."""
    batches = AT_ONCE if cfg.cluster.gpu == "cpu" else AT_ONCE + GIVEN_BACK
    image = slots.latent_bytes(cfg) + slots.text_bytes(cfg) + 8
    making = 2 * slots.latent_bytes(cfg)
    if not cfg.encoders.image.stored:
        making += slots.latent_bytes(cfg) + slots.picture_bytes(cfg)
    return layout.microbatches * layout.microbatch * ((batches - 1) * image + max(image, making))
