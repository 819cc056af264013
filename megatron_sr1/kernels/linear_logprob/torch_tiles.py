"""The torch back end of linear_logprob: elementwise torch on tiles of logits, on any device, in any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sr1.kernels.linear_logprob.tiles import Backend, RowGradients, Tile, dtypes, raw_product


class TorchTiles:
    """A tile is z [R, C], in the accumulation dtype."""

    def make(self, hidden: Tensor, weight: Tensor, tile: Tile) -> Tensor:
        z = raw_product(hidden, weight, tile.rounded).to(dtypes(hidden)[0])
        if tile.bias is not None:
            z.add_(tile.bias)
        if tile.inverse_temperature is not None:
            z.mul_(tile.inverse_temperature.unsqueeze(1))
        return z

    def fold(self, state: Tensor, z: Tensor, tile: Tile, entropy: bool) -> None:
        top, total, z_target, weighted = state.unbind()
        held, index = _held(tile.targets, z.shape[1])
        z_target.copy_(torch.where(held, z.gather(1, index).squeeze(1), z_target))
        new_top = torch.maximum(top, z.amax(1))
        shifted = z - new_top.unsqueeze(1)
        drop = top - new_top
        decay = drop.exp()
        if entropy:
            exponentials = shifted.exp()
            weighted.copy_(decay * (weighted + drop * total) + torch.linalg.vecdot(exponentials, shifted))
        else:
            exponentials = shifted.exp_()
        total.mul_(decay).add_(exponentials.sum(1))
        top.copy_(new_top)

    def gradient(
        self, z: Tensor, logsumexp: Tensor, tile: Tile, gradients: RowGradients, dtype: torch.dtype, overwrite: bool
    ) -> Tensor:
        """See TileOperations."""
        log_p = torch.sub(z, logsumexp.unsqueeze(1), out=z if overwrite else None)
        of_p = gradients.of_p.unsqueeze(1)
        if gradients.of_p_log_p is None:
            grad_z = log_p.exp_().mul_(-of_p)
        else:
            p = log_p.exp()
            grad_z = log_p.mul_(gradients.of_p_log_p.unsqueeze(1)).add_(of_p).mul_(p).neg_()
        held, index = _held(tile.targets, log_p.shape[1])
        return grad_z.scatter_add_(1, index, (gradients.at_target * held).unsqueeze(1)).to(dtype)


TORCH = Backend(TorchTiles())


def _held(targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which targets [R] lie in this tile, and an index [R, 1] that is valid for all of them."""
    return (targets >= 0) & (targets < columns), targets.clamp(0, columns - 1).unsqueeze(1)
