"""The vision tower's work, shared by the ranks of a model replica: every patch is encoded once."""

from megatron_sr1.policy.vision.assignment import ImagePiece, SplitCosts, VisionPlan, plan_images
from megatron_sr1.policy.vision.patches import VisionTower
from megatron_sr1.policy.vision.shared import SharedVision, encode_images, plan_grids

__all__ = [
    "ImagePiece",
    "SharedVision",
    "SplitCosts",
    "VisionPlan",
    "VisionTower",
    "encode_images",
    "plan_grids",
    "plan_images",
]
