"""Stage 5: the decoder, on cached features of the finished encoder: captions and answers.

A sequence is a prompt and an answer after the visual tokens of its image:
    <bos> a sentence <eos>
    <ask> a question <answer> an answer <eos>

Few of all words are answers, and many of these a single yes or no: after ``answers_from`` of the time, when the decoder
has learnt to see and to speak, answers are asked for more often and weigh as much as captions.

Decoders that were trained for other times and with other dropout know different things, and their mean more than each:
the last of such TEACHERS can go on as a student, which learns what they say together (Hinton et al. 2015, "Distilling
the Knowledge in a Neural Network"; from equals, Furlanello et al. 2018, "Born-Again Neural Networks"). The packaged
decoder learnt alone: a student was surer of validation captions and answers (``likelihood``: 0.914 and 0.562 nats per
token for 0.949 and 0.603), and its words were no better.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    "minutes": 36.0,
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
"""Of a decoder that learns alone. In more time it learns captions by heart: those of validation images become less
likely, while their answers go on gaining."""
TEACHERS: tuple[dict[str, Any], ...] = (
    {"minutes": 65.0},
    {"minutes": 56.0, "dropout": 0.3},
    {"minutes": 28.0, "dropout": 0.3},
)
"""What they have beside DEFAULTS."""
TAUGHT: dict[str, Any] = {
    "minutes": 36.0,
    "answers_from": 0.0,
    "rate": 5e-4,
    "dropout": 0.3,
    "teachers_share": 0.8,
}
"""What their student has; the rest of its loss is what it has when alone."""
SEQUENCES = 3
"""Of an image at a time: sentences of one image repeat each other."""
MOST_TOKENS = 40
IGNORE = -100
TOKENIZER_NAME = "tokenizer.json"
VOCABULARY_NAME = "vocabulary.txt"
"""Words that are said of scenes and asked about them, one a line."""
Batch = dict[str, Tensor]
Pair = tuple[str, str]
"""Prompt and answer."""


def run(
    data: Path,
    work: Path,
    config: dict[str, Any],
    backbone: artifact.Artifact,
    vision: artifact.Artifact,
    teachers: Sequence[artifact.Artifact] = (),
    name: str = NAME,
) -> artifact.Artifact:
    """Train, as the student of ``teachers`` where there are any.

    The artifact, in the folder ``name`` of ``work``, also holds the tokenizer, and the words that were learnt.
    """
    config = DEFAULTS | (TAUGHT if teachers else {}) | config
    digest = artifact.stage_hash(NAME, config, [backbone, vision, *teachers])
    if found := artifact.find(work / name, digest):
        return found
    torch.manual_seed(config["seed"])
    seen = features.of_scenes(data, work, backbone, vision)
    decoder = DecoderConfig(seen.tokenizer.get_vocab_size(), dropout=config["dropout"])
    model, taught = Language(decoder), None
    if teachers:
        model.load_state_dict(teachers[-1].tensors())
        taught = Teachers([trained(teacher) for teacher in teachers], config["teachers_share"])
    model = model.to(device()).train()
    said = Said(seen, config, np.random.default_rng(config["seed"]))
    batches = ahead(said, depth=4)

    def losses(progress: float) -> dict[str, Tensor]:
        apart = progress >= config["answers_from"]
        if apart:
            said.question_share = config["question_share_then"]
        return loss(model, next(batches), config["label_smoothing"], apart=apart, taught=taught)

    state, metrics = train(
        model, [{"params": list(model.parameters()), "lr": config["rate"]}], losses,
        minutes=config["minutes"], checkpoint=work / f"{NAME}-{digest[:12]}.pt",
    )  # fmt: skip
    return artifact.write(work / name, NAME, digest, config, metrics, state, texts(seen))


def trained(done: artifact.Artifact) -> Language:
    """What an artifact of this stage holds, which answers as it will on a device: without dropout."""
    tensors = done.tensors()
    model = Language(DecoderConfig(len(tensors["decoder.embed_tokens.weight"])))
    model.load_state_dict(tensors)
    return model.to(device()).eval()


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
        sequences: list[list[Pair]] = []
        while len(maps) < self.config["images"]:
            number = 0 if self.rng.random() < self.config["ucm_share"] else 1
            part = self.seen.parts[number]
            image, view = int(self.rng.choice(part.usable)), int(self.rng.integers(part.views))
            if found := self._sequences(number, image, view):
                maps.append(part.store[image, view])
                sequences.append(found)
        return {"tokens": torch.from_numpy(np.stack(maps)), **padded(self.seen.tokenizer, sequences)}

    def _sequences(self, number: int, image: int, view: int) -> list[Pair]:
        """Of a turned image, captions that hold whichever way it lies, and answers whose places turn with it."""
        captions = [c for c in self.captions[number][image] if view == 0 or not points_somewhere(c)]
        questions = self._asked(image, view) if number == 0 else []
        found: list[Pair] = []
        for _ in range(SEQUENCES):
            if questions and (not captions or self.rng.random() < self.question_share):
                q = questions[int(self.rng.integers(len(questions)))]
                found.append((prompt_of(q.question), q.answer))
            elif captions:
                found.append((BOS, captions.pop(int(self.rng.integers(len(captions))))))
        return found

    def _asked(self, image: int, view: int) -> list[Question]:
        answers = [
            (q.question, self.turned(q.answer, view) if q.of_a_place else q.answer) for q in self.questions[image]
        ]
        return [Question(question, answer) for question, answer in answers if answer is not None]


def prompt_of(question: str) -> str:
    return f"{ASK}{question}{ANSWER}"


def padded(tokenizer: Any, sequences: list[list[Pair]], count: int = SEQUENCES) -> Batch:
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


@dataclass(frozen=True)
class Teachers:
    """``trained`` decoders. ``share`` of a loss is to say what they say ``together``."""

    models: Sequence[Language]
    share: float


@torch.no_grad()
def together(models: Sequence[Language], batch: Batch) -> Tensor:
    """The mean of the probabilities that several decoders give [K,V], as ``next_logits`` has them."""
    return torch.stack([next_logits(model, batch).softmax(dim=1) for model in models]).mean(dim=0)


def next_logits(model: Language, batch: Batch) -> Tensor:
    """[K,V] over the vocabulary, at each of the K tokens of the batch that are expected."""
    count, sequences, length = batch["fed"].shape
    where = batch["fed"].device
    with torch.autocast(where.type, torch.bfloat16):
        prefix = model.prefix(batch["tokens"])
        positions, mask = packed_layout(prefix.shape[1], sequences, length)
        words = model.decoder.embed(batch["fed"].flatten(1)).to(prefix.dtype)
        hidden, _ = model.decoder(
            torch.cat([prefix, words], dim=1), positions.to(where).expand(count, -1), mask.to(where)
        )
        known = batch["expected"].flatten(1) != IGNORE
        logits: Tensor = model.decoder.logits(hidden[:, prefix.shape[1] :][known])
    return logits.float()


def loss(
    model: Language, batch: Batch, smoothing: float, *, apart: bool, taught: Teachers | None = None
) -> dict[str, Tensor]:
    """Cross-entropy of the next token of captions and answers: of all ``words`` together, or ``apart``; with teachers
    also against what they say."""
    where = device()
    batch = {name: value.to(where) for name, value in batch.items()}
    known = batch["expected"].flatten(1) != IGNORE
    logits = next_logits(model, batch)
    each = F.cross_entropy(logits, batch["expected"].flatten(1)[known], label_smoothing=smoothing, reduction="none")
    if taught:
        each = (1 - taught.share) * each + taught.share * F.cross_entropy(
            logits, together(taught.models, batch), reduction="none"
        )
    if not apart:
        return {"words": each.mean()}
    answers = batch["asked"][..., None].expand(-1, -1, batch["fed"].shape[2]).flatten(1)[known]
    return {
        name: (each * part).sum() / part.sum().clamp(min=1)
        for name, part in (("captions", ~answers), ("answers", answers))
    }
