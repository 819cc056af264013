"""A loss of the user's own in place of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_sr1.import_path import UserCode, UserCodeError, load_object, source_of
from megatron_sr1.types import LossInputs

_KEY = "objective.loss"


class OwnLoss:
    """Calls a function (LossInputs) -> (loss, metrics), and looks at what it returns.

    The loss, and each metric, of a micro-batch must be its part of a sum over micro-batches and replicas:
    `token_weights` hold the global denominators.
    """

    def __init__(self, path: str) -> None:
        """
        Raises:
            ValueError: there is nothing to be called at the import path.
        """
        self._path = path
        self._function = load_object(path, _KEY)
        if not callable(self._function) or isinstance(self._function, type):
            raise ValueError(f"{_KEY}={path!r} is {self._function!r}: it must be a function of LossInputs.")

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss, a scalar, and its metrics by name, scalars without gradient.

        Raises:
            UserCodeError: the function failed, or returned something else.
        """
        what = f"{_KEY}={self._path!r}"
        with UserCode(f"{what} failed", source_of(self._function)):
            found: Any = self._function(inputs)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Mapping):
            raise UserCodeError(f"{what} returned {type(found).__name__}: it must be (loss, {{name: metric}}).")
        loss, metrics = found
        if not isinstance(loss, Tensor) or loss.shape != () or not loss.requires_grad:
            raise UserCodeError(f"{what} returned {loss!r} as its loss: it must be a scalar tensor with a gradient.")
        return loss, {f"loss/{name}": _metric(what, name, value, loss) for name, value in metrics.items()}


def _metric(what: str, name: Any, value: Any, loss: Tensor) -> Tensor:
    if not isinstance(name, str) or not isinstance(value, Tensor | int | float):
        raise UserCodeError(f"{what} returned the metric {name!r}: {value!r}: it must be a name with a number.")
    number = torch.as_tensor(value, dtype=loss.dtype, device=loss.device).detach()
    if number.shape != ():
        raise UserCodeError(f"{what} returned the metric {name!r} of shape {tuple(number.shape)}: it must be a scalar.")
    return number
