"""Losses of the heads. Shapes as in the heads' modules."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def heat_loss(logits: Tensor, heat: Tensor, weight: Tensor) -> Tensor:
    """Penalty-reduced focal loss per object (Zhou et al. 2019, "Objects as Points", eq. 1), on trusted cells only."""
    log_p, log_not = F.logsigmoid(logits), F.logsigmoid(-logits)
    p = log_p.exp()
    peak = heat == 1
    positive = (1 - p) ** 2 * log_p * peak
    negative = (1 - heat) ** 4 * p**2 * log_not * ~peak
    return -(weight * (positive + negative)).sum() / (peak * (weight > 0)).sum().clamp(min=1)


def sides_loss(log_sides: Tensor, sides: Tensor, weight: Tensor) -> Tensor:
    """1 - IoU of the boxes that both side sets span from one point (Yu et al. 2016, "UnitBox"), plus a log term."""
    predicted = log_sides.exp()
    common = torch.minimum(predicted, sides)
    inter = (common[:, 0] + common[:, 2]) * (common[:, 1] + common[:, 3])
    area = (predicted[:, 0] + predicted[:, 2]) * (predicted[:, 1] + predicted[:, 3])
    wanted = (sides[:, 0] + sides[:, 2]) * (sides[:, 1] + sides[:, 3])
    loss = 1 - inter / (area + wanted - inter)
    loss = loss + 0.2 * F.smooth_l1_loss(log_sides, sides.log(), reduction="none").mean(dim=1)
    return (weight * loss).sum() / weight.sum().clamp(min=1e-6)


def change_loss(logits: Tensor, share: Tensor) -> Tensor:
    """Cross-entropy against the changed share of each cell, plus soft Dice over the batch; cells of -1 are left out."""
    known = (share >= 0).float()
    target = share.clamp(min=0)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=logits.new_tensor(2.0))
    p = torch.sigmoid(logits) * known
    dice = 1 - (2 * (p * target).sum() + 1) / ((p**2).sum() + (target**2 * known).sum() + 1)
    return (entropy * known).sum() / known.sum().clamp(min=1) + dice
