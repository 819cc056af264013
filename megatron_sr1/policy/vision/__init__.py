"""The vision tower's work, shared by the ranks of a model replica: every patch is encoded once."""

from megatron_sr1.policy.vision.assignment import ImagePiece, SplitCosts, VisionPlan, plan_images
from megatron_sr1.policy.vision.patches import VisionTower, new_tower
from megatron_sr1.policy.vision.shared import SharedVision, encode_images, plan_grids

__all__ = [
    "ImagePiece",
    "SharedVision",
    "SplitCosts",
    "VisionPlan",
    "VisionTower",
    "encode_images",
    "new_tower",
    "plan_grids",
    "plan_images",
]
