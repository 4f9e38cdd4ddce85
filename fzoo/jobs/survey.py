"""How many images a job has: walked once to know, and again to read them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator

from fzoo.images.files import ImageFile, PassedOver
from fzoo.images.walk import find_images


class Survey:
    """How many images there are, and where: walked once to know, and again to read them, with a look that they stayed.

    Args:
        given: as for `find_images`, whose errors this raises.

    Attributes:
        given: the paths.
        count: how many images.
        digest: a hash of their names and places.
        passed_over: other files beside them.
    """

    def __init__(self, given: Iterable[str | os.PathLike]):
        self.given, self.count, digest = list(given), 0, hashlib.blake2b(digest_size=16)
        self.passed_over = PassedOver()
        for image in find_images(self.given, self.passed_over):
            self.count += 1
            digest.update(encode_place(image))
        self.digest = digest.hexdigest()

    def __iter__(self) -> Iterator[ImageFile]:
        digest = hashlib.blake2b(digest_size=16)
        for image in find_images(self.given):
            digest.update(encode_place(image))
            yield image
        if digest.hexdigest() != self.digest:
            raise ValueError(
                "images were added or removed while the job ran: start over, with --restart (restart=True)"
            )


def encode_place(image: ImageFile) -> bytes:
    """Return what identifies an image, whatever its content."""
    return os.fsencode(f"{image.name}\0{image.path}\0{image.offset}\0{image.size}\n")
