"""An image as a vision tower reads it. `types` has the shape legend and the other values that flow between rooms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_sr1.ahead import Later


@dataclass(frozen=True)
class Normalisation:
    """What a vision tower's grey levels of 0 to 255 become before it reads them, by channel."""

    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def applied(self, patches: Tensor) -> Tensor:
        """[P, C] float32 on the same device, of patches [P, C] whose values lie channel after channel."""
        values = patches.unflatten(1, (len(self.mean), -1)).float() * self.rescale
        mean, std = (values.new_tensor(levels).unsqueeze(1) for levels in (self.mean, self.std))
        return values.sub_(mean).div_(std).flatten(1)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image for the vision tower. Two sequences that hold the same object share one pass through it.

    The grid follows from the image's size; the patches are made when they are started or first asked for, because of
    all the ranks that plan with the image only one encodes it.
    """

    grid_thw: tuple[int, int, int]  # patches along time, height, width
    patches: Later[Tensor]  # [P, C] uint8, resized and cut, not normalised
    normalisation: Normalisation

    @property
    def pixel_values(self) -> Tensor:
        """[P, C] float32, as the model's own processor makes them."""
        return self.normalisation.applied(self.patches())
