"""Stage 5: the decoder, on cached features of the finished encoder: captions and answers.

A sequence is a prompt and an answer after the visual tokens of its image:
    <bos> a sentence <eos>
    <ask> a question <answer> an answer <eos>

Few of all words are answers, and many of these a single yes or no: after ``answers_from`` of the time, when the decoder
has learnt to see and to speak, answers are asked for more often and weigh as much as captions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.captions import BOS, EOS, points_somewhere
from edge_rsvlm.export.default.data.places import Turned
from edge_rsvlm.export.default.data.questions import Question, asked, made, themes
from edge_rsvlm.export.default.data.words import sentences, vocabulary
from edge_rsvlm.export.default.loop import ahead, device, train
from edge_rsvlm.export.default.model.decoder import DecoderConfig, packed_layout
from edge_rsvlm.export.default.model.language import Language
from edge_rsvlm.export.default.stages import features
from edge_rsvlm.export.default.stages.features import ANSWER, ASK

NAME = "language"
DEFAULTS: dict[str, Any] = {
    "minutes": 88.0,
    "images": 48,
    "ucm_share": 0.5,
    "question_share": 0.35,
    "answers_from": 0.5,
    "question_share_then": 0.5,
    "rate": 1.5e-3,
    "dropout": 0.15,
    "label_smoothing": 0.1,
    "seed": 0,
}
SEQUENCES = 3
"""Of an image at a time: sentences of one image repeat each other."""
MOST_TOKENS = 40
IGNORE = -100
TOKENIZER_NAME = "tokenizer.json"
VOCABULARY_NAME = "vocabulary.txt"
"""Words that are said of scenes and asked about them, one a line."""
Batch = dict[str, Tensor]
Sequence = tuple[str, str]
"""Prompt and answer."""


def run(
    data: Path, work: Path, config: dict[str, Any], backbone: artifact.Artifact, vision: artifact.Artifact
) -> artifact.Artifact:
    """Train; the artifact also holds the tokenizer, and the words that were learnt."""
    config = DEFAULTS | config
    digest = artifact.stage_hash(NAME, config, [backbone, vision])
    if found := artifact.find(work / NAME, digest):
        return found
    torch.manual_seed(config["seed"])
    seen = features.of_scenes(data, work, backbone, vision)
    model = Language(DecoderConfig(seen.tokenizer.get_vocab_size(), dropout=config["dropout"])).to(device()).train()
    rng = np.random.default_rng(config["seed"])
    said = Said(seen, config, rng)
    batches = ahead(said, depth=4)

    def losses(progress: float) -> dict[str, Tensor]:
        apart = progress >= config["answers_from"]
        if apart:
            said.question_share = config["question_share_then"]
        return loss(model, next(batches), config["label_smoothing"], apart=apart)

    state, metrics = train(
        model, [{"params": list(model.parameters()), "lr": config["rate"]}], losses,
        minutes=config["minutes"], checkpoint=work / f"{NAME}-{digest[:12]}.pt",
    )  # fmt: skip
    return artifact.write(work / NAME, NAME, digest, config, metrics, state, texts(seen))


def texts(seen: features.Scenes) -> dict[str, str]:
    """Files of the artifact by name."""
    said = features.texts([(part.scenes, part.usable) for part in seen.parts])
    return {
        TOKENIZER_NAME: seen.tokenizer.to_str(),
        VOCABULARY_NAME: "".join(f"{word}\n" for word in vocabulary(said)),
    }


@dataclass
class Said:
    """Batches of scenes with sentences and questions."""

    seen: features.Scenes
    config: dict[str, Any]
    rng: np.random.Generator
    question_share: float = field(init=False)
    questions: dict[int, list[Question]] = field(init=False)
    turned: Turned = field(init=False)
    captions: list[list[list[str]]] = field(init=False)

    def __post_init__(self) -> None:
        self.question_share = self.config["question_share"]
        ucm = self.seen.parts[0]
        theme = themes(ucm.scenes.scenes[int(i)] for i in ucm.usable)
        # RSIVQA's own are as likely as the others together: they are what is asked in the end.
        self.questions = {}
        for i in map(int, ucm.usable):
            scene = ucm.scenes.scenes[i]
            own, others = asked(scene), made(scene, theme)
            self.questions[i] = own * max(1, len(others) // max(len(own), 1)) + others
        self.turned = Turned(q.answer for found in self.questions.values() for q in found if q.of_a_place)
        self.captions = [[sentences(scene) for scene in part.scenes.scenes] for part in self.seen.parts]

    def __call__(self) -> Batch:
        maps: list[npt.NDArray[np.float32]] = []
        sequences: list[list[Sequence]] = []
        while len(maps) < self.config["images"]:
            number = 0 if self.rng.random() < self.config["ucm_share"] else 1
            part = self.seen.parts[number]
            image, view = int(self.rng.choice(part.usable)), int(self.rng.integers(part.views))
            if found := self._sequences(number, image, view):
                maps.append(part.store[image, view])
                sequences.append(found)
        return {"tokens": torch.from_numpy(np.stack(maps)), **padded(self.seen.tokenizer, sequences)}

    def _sequences(self, number: int, image: int, view: int) -> list[Sequence]:
        """Of a turned image, captions that hold whichever way it lies, and answers whose places turn with it."""
        captions = [c for c in self.captions[number][image] if view == 0 or not points_somewhere(c)]
        questions = self._asked(image, view) if number == 0 else []
        found: list[Sequence] = []
        for _ in range(SEQUENCES):
            if questions and (not captions or self.rng.random() < self.question_share):
                q = questions[int(self.rng.integers(len(questions)))]
                found.append((f"{ASK}{q.question}{ANSWER}", q.answer))
            elif captions:
                found.append((BOS, captions.pop(int(self.rng.integers(len(captions))))))
        return found

    def _asked(self, image: int, view: int) -> list[Question]:
        answers = [
            (q.question, self.turned(q.answer, view) if q.of_a_place else q.answer) for q in self.questions[image]
        ]
        return [Question(question, answer) for question, answer in answers if answer is not None]


def padded(tokenizer: Any, sequences: list[list[Sequence]], count: int = SEQUENCES) -> Batch:
    """``fed`` [N,S,T] and ``expected`` [N,S,T], IGNORE in the prompt and beyond the end; ``asked`` [N,S] marks
    questions."""
    eos = tokenizer.token_to_id(EOS)
    pairs = [
        [tuple(tokenizer.encode(text, add_special_tokens=False).ids for text in pair) for pair in of_image]
        for of_image in sequences
    ]
    longest = min(MOST_TOKENS, max(len(p) + len(a) for of_image in pairs for p, a in of_image))
    fed = np.full((len(pairs), count, longest), eos, np.int64)
    expected = np.full_like(fed, IGNORE)
    of_question = np.zeros(fed.shape[:2], np.bool_)
    for n, of_image in enumerate(pairs):
        for s, (prompt, answer) in enumerate(of_image):
            whole = [*prompt, *answer, eos][: longest + 1]
            fed[n, s, : len(whole) - 1] = whole[:-1]
            expected[n, s, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
            of_question[n, s] = sequences[n][s][0] != BOS
    return {
        "fed": torch.from_numpy(fed),
        "expected": torch.from_numpy(expected),
        "asked": torch.from_numpy(of_question),
    }


def loss(model: Language, batch: Batch, smoothing: float, *, apart: bool) -> dict[str, Tensor]:
    """Cross-entropy of the next token of captions and answers: of all ``words`` together, or ``apart``."""
    where = device()
    batch = {name: value.to(where) for name, value in batch.items()}
    count, sequences, length = batch["fed"].shape
    with torch.autocast(where.type, torch.bfloat16):
        prefix = model.prefix(batch["tokens"])
        positions, mask = packed_layout(prefix.shape[1], sequences, length)
        words = model.decoder.embed(batch["fed"].flatten(1)).to(prefix.dtype)
        hidden, _ = model.decoder(
            torch.cat([prefix, words], dim=1), positions.to(where).expand(count, -1), mask.to(where)
        )
        known = batch["expected"].flatten(1) != IGNORE
        logits = model.decoder.logits(hidden[:, prefix.shape[1] :][known])
    each = F.cross_entropy(
        logits.float(), batch["expected"].flatten(1)[known], label_smoothing=smoothing, reduction="none"
    )
    if not apart:
        return {"words": each.mean()}
    answers = batch["asked"][..., None].expand(-1, -1, length).flatten(1)[known]
    return {
        name: (each * part).sum() / part.sum().clamp(min=1)
        for name, part in (("captions", ~answers), ("answers", answers))
    }
