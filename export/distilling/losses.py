"""The losses of a distillation, and the maps that let features of two widths be compared.

Letters: A answer tokens, V vocabulary, B images and texts of a batch, T visual tokens, D width of a feature.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from edge_rsvlm.errors import UsageError

Kind = Literal["cosine", "mse"]


def token_divergence(student_AV: Tensor, teacher_AV: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each token's distribution [A], softened, and times temperature squared, so that the
    size of its gradient does not depend on it. Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural
    Network"."""
    return _divergence(student_AV / temperature, teacher_AV / temperature) * temperature**2


def similarity_divergence(student_BB: Tensor, teacher_BB: Tensor, temperature: float, score: str) -> Tensor:
    """How far the similarities of a batch's images (rows) and texts are from the teacher's, a scalar.

    ``score`` softmax: KL of each image's distribution over the texts and each text's over the images, the mean of both
    directions. Source: Wu et al. 2023, "TinyCLIP" (affinity mimicking), Yang et al. 2024, "CLIP-KD" (contrastive
    relational distillation). ``score`` sigmoid: KL of every pair's probability, summed over an image's pairs as
    Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", sum their loss.
    """
    student_BB, teacher_BB = student_BB / temperature, teacher_BB / temperature
    if score == "sigmoid":
        pairs = [_divergence(_two_sided(student_BB), _two_sided(teacher_BB)).sum(1).mean()]
    else:
        pairs = [_divergence(s, t).mean() for s, t in ((student_BB, teacher_BB), (student_BB.T, teacher_BB.T))]
    return torch.stack(pairs).mean() * temperature**2


def feature_distance(student_TD: Tensor, teacher_TD: Tensor, kind: Kind) -> Tensor:
    """1 - cosine, or the mean squared difference, of each row [T]."""
    if kind == "mse":
        return (student_TD - teacher_TD).square().mean(-1)
    return 1 - nn.functional.cosine_similarity(student_TD, teacher_TD, dim=-1)


def feature_map(student_width: int, teacher_width: int, device: torch.device) -> nn.Module:
    """The student's features as wide as the teacher's, by a linear map that is learnt with the student and then thrown
    away (Romero et al. 2015, "FitNets"); nothing where they already are."""
    if student_width == teacher_width:
        return nn.Identity()
    return nn.Linear(student_width, teacher_width, bias=False).to(device)


def add_gradients(loss: Tensor) -> None:
    """``backward``; raises UsageError where nothing that is learnt took part in the loss."""
    if not loss.requires_grad:
        raise UsageError("no loss depends on the parameters of 'train'", fix="add parts of the model, or losses")
    loss.backward()


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits over the last dimension."""
    wanted, said = teacher.log_softmax(-1), student.log_softmax(-1)
    return (wanted.exp() * (wanted - said)).sum(-1)


def _two_sided(logits: Tensor) -> Tensor:
    """Logits [..., 2] of yes and no, whose softmax is the sigmoid."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)
