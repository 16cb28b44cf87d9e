"""Losses of the heads. Shapes as in the heads' modules."""

from __future__ import annotations

import math

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


def covered_loss(logits_NKhw: Tensor, labels_NK: Tensor, sharpness: float = 4.0) -> Tensor:
    """Cross-entropy of what an image shows somewhere, from logits per cell.

    Cells are pooled by log-mean-exp, which lies between their mean and their maximum (Pinheiro & Collobert 2015, "From
    Image-level to Pixel-level Labeling with Convolutional Networks", section 3.3).
    """
    if not len(logits_NKhw):
        return logits_NKhw.sum()
    cells = logits_NKhw.float().flatten(2)
    pooled = (torch.logsumexp(sharpness * cells, dim=2) - math.log(cells.shape[2])) / sharpness
    return F.binary_cross_entropy_with_logits(pooled, labels_NK)


def known_loss(logits: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy of cells that are 1 or 0, each of the two as much as the other; those of -1 are left out."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), known.clamp(min=0), reduction="none")
    yes, no = known == 1, known == 0
    return (loss * yes).sum() / yes.sum().clamp(min=8) + (loss * no).sum() / no.sum().clamp(min=8)
