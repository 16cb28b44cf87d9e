"""Gradients of a student that writes text.

Samples go through the models one by one, so that images of any size and number of tiles make a batch. Letters:
L losses, T visual tokens, D their width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.distilling.data import Item
from edge_rsvlm.export.distilling.generators import Generator, Outputs, without_end
from edge_rsvlm.export.distilling.losses import add_gradients, feature_distance, feature_map, token_divergence
from edge_rsvlm.export.distilling.recipe import Losses
from edge_rsvlm.export.finetuning.answers import answer_ids
from edge_rsvlm.export.finetuning.loop import Process
from edge_rsvlm.export.finetuning.samples import Encoded, Encoder, Sample


def check_vocabularies(teacher: Encoder, student: Encoder) -> None:
    """UsageError where the two do not number the same tokens alike."""
    one, other = teacher.vocabulary, student.vocabulary
    if one == other:
        return
    token = min(token for token in one.keys() | other.keys() if one.get(token) != other.get(token))
    raise UsageError(
        f"[losses.logits] needs one vocabulary: the teacher's has {len(one)} tokens and the student's {len(other)}, and"
        f" {token!r} is number {one.get(token, 'none')} of the one and {other.get(token, 'none')} of the other",
        fix="use [losses.captions] and [losses.features], which any two models can share",
    )


class AnswerGradients:
    """The losses of ``names``, each a mean over what it is about: answer tokens, or images.

    ``teacher`` is None where no loss asks it anything.
    """

    def __init__(self, losses: Losses, teacher: Generator | None, student: Generator, process: Process) -> None:
        self.names = tuple(losses.weights)
        self._losses, self._process = losses, process
        self._teacher, self._student = teacher, student
        self._map: nn.Module = nn.Identity()
        self._shared_tokens = len(student.encoder.vocabulary)

    def fit(self, sample: Sample) -> dict[str, nn.Parameter]:
        """Find from one sample how features have to be mapped; what is learnt of that."""
        if self._losses.features is None:
            return {}
        with torch.no_grad():
            seen = self._student(self._student.encoder.answering(sample, ())).features_TD
        taught = self._taught(sample, Encoded({}, 0)).features_TD
        self._map = feature_map(seen.shape[1], taught.shape[1], self._process.device)
        self._feature_loss(seen, taught)
        return dict(self._map.named_parameters(prefix="map"))

    def __call__(self, share: list[Item]) -> Tensor:
        encoded = [self._encode(item) for item in share]
        counts_L = self._counts(share, encoded)
        total_L = torch.zeros(len(self.names), device=self._process.device)
        weights_L = torch.tensor(list(self._losses.weights.values()), device=self._process.device)
        for item, one in zip(share, encoded, strict=True):
            sums_L = self._sums(item, one) / counts_L.clamp(min=1)
            add_gradients((weights_L * sums_L).sum())
            total_L += sums_L.detach()
        return torch.cat([(weights_L * total_L).sum()[None], total_L.where(counts_L > 0, torch.nan)])

    def _encode(self, item: Item) -> Encoded:
        if item.answer is None:
            return self._student.encoder.answering(item.sample, ())
        encoded = self._student.encoder(item.sample)
        return encoded if item.whole else without_end(encoded)

    def _counts(self, share: list[Item], encoded: list[Encoded]) -> Tensor:
        """How many tokens or images of the whole batch each loss is of [L]."""
        counts_L = torch.zeros(len(self.names), device=self._process.device)
        for item, one in zip(share, encoded, strict=True):
            counts_L += torch.tensor([self._units(name, item, one) for name in self.names], device=self._process.device)
        return self._process.total(counts_L)

    def _units(self, name: str, item: Item, encoded: Encoded) -> float:
        if name == "features":
            return 1.0
        return float(encoded.answer_tokens) if name in ("logits", item.answer) else 0.0

    def _sums(self, item: Item, encoded: Encoded) -> Tensor:
        """The losses of one sample [L], not yet divided."""
        said = self._student(encoded)
        taught = self._taught(item.sample, encoded) if self._teacher else None
        found = dict.fromkeys(self.names, torch.zeros((), device=self._process.device))
        if item.answer in found and said.logits_AV is not None:
            ids = answer_ids(encoded).to(self._process.device)
            found[item.answer] = nn.functional.cross_entropy(said.logits_AV, ids, reduction="sum")
        if self._losses.logits and taught and said.logits_AV is not None and taught.logits_AV is not None:
            # Vocabularies are padded, not always to the same size.
            shared = [logits[:, : self._shared_tokens] for logits in (said.logits_AV, taught.logits_AV)]
            found["logits"] = token_divergence(shared[0], shared[1], self._losses.logits.temperature).sum()
        if self._losses.features and taught:
            found["features"] = self._feature_loss(said.features_TD, taught.features_TD)
        return torch.stack([found[name] for name in self.names])

    def _taught(self, sample: Sample, encoded: Encoded) -> Outputs:
        """The teacher's outputs, for the tokens that the student learns."""
        assert self._teacher is not None
        ids = answer_ids(encoded).tolist() if encoded.answer_tokens and self._losses.logits else ()
        with torch.no_grad():
            return self._teacher(self._teacher.encoder.answering(sample, ids))

    def _feature_loss(self, seen_TD: Tensor, taught_TD: Tensor) -> Tensor:
        assert self._losses.features is not None
        seen_TD = self._map(seen_TD)
        if self._losses.features.pool:
            seen_TD, taught_TD = seen_TD.mean(0, keepdim=True), taught_TD.mean(0, keepdim=True)
        if len(seen_TD) != len(taught_TD):
            raise UsageError(
                f"[losses.features]: an image is {len(taught_TD)} visual tokens of the teacher and {len(seen_TD)} of"
                " the student",
                fix="set pool = true, which compares their means",
            )
        return feature_distance(seen_TD, taught_TD, self._losses.features.kind).mean()
