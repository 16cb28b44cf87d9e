"""What a step that changes the model costs its tasks: before and after, on the same images.

Tasks with labels are scored by ``edge_rsvlm.evaluate`` as users run it, and lose what their paired scores say. The
others are compared with the answers before the step: words token by token, boxes as if those before were the truth,
embeddings by their cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm import evaluate as scored
from edge_rsvlm import scoring
from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.manifest import Comparison
from edge_rsvlm.config.task_specs import AnswerTask, GenerateTask, GgufTask
from edge_rsvlm.errors import UsageError
from edge_rsvlm.evaluate.labels import read_pairs
from edge_rsvlm.evaluate.segment import evaluate_segment, labelled_objects
from edge_rsvlm.export.proof.gates import AGREEMENT, COSINE, LOSS, Check
from edge_rsvlm.export.recipe import Evaluate
from edge_rsvlm.pipeline.detect import DetectQuery
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.raster.inputs import Source, list_inputs
from edge_rsvlm.scoring import Found, Score, Truth
from edge_rsvlm.tasks.generate import Generator, Sampling
from edge_rsvlm.tasks.gguf import GgufGenerator
from edge_rsvlm.tasks.vocabulary import read_vocabulary
from edge_rsvlm.tiles.prepare import Prepared

METRICS = {
    "detect": "AP50", "change": "F1", "caption": "CIDEr", "ask": "accuracy", "classify": "accuracy",
    "segment": "balanced accuracy",
}  # fmt: skip
RING_PX = (8.0, 16.0)
"""Of ``edge-rsvlm eval segment``, unless told otherwise."""
MEMORY_BYTES = 64 << 30
"""Not what is measured here: the ground has its own limits."""
LEAST_SCORE = 0.05
DEFAULT_TEXT, DEFAULT_WORDS = "what is in this image?", 8
FOLLOWED_TOKENS, FOLLOWED_TILES = 16, 4
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Compared:
    """Tasks by their labels, and the checks of the gate."""

    comparisons: tuple[Comparison, ...]
    checks: tuple[Check, ...]


def open_session(bundle: Bundle, threads: int = 1) -> Session:
    return Session(bundle, Limits(memory_bytes=MEMORY_BYTES, threads=threads))


def compare_labelled(
    step: str, before: Bundle, after: Bundle, choices: Sequence[Evaluate], progress: Progress
) -> Compared:
    """Scores of both bundles on the same labels; UsageError when the bundle has no such task."""
    comparisons, checks = [], []
    for choice in choices:
        scores = [_score(bundle, choice, progress) for bundle in (before, after)]
        found = _comparison(step, choice, *scores)
        comparisons.append(found)
        checks += loss_checks(found)
    return Compared(tuple(comparisons), tuple(checks))


def loss_checks(found: Comparison) -> list[Check]:
    """The mean loss of a task, and the upper end of its interval."""
    mean, bound = LOSS.get(found.metric, LOSS[""])
    name = f"{found.task} on {found.data}"
    return [
        Check(name, f"{found.metric} loss", found.loss, mean),
        Check(name, f"{found.metric} loss, 95 % bound", found.bound, bound),
    ]


def _comparison(step: str, choice: Evaluate, before: Score, after: Score) -> Comparison:
    return Comparison(
        step=step, task=choice.task, metric=before.metric, before=before.value, after=after.value,
        loss=before.value - after.value, bound=scoring.loss_bound(before, after), samples=before.samples,
        data=_named(choice.labels),
    )  # fmt: skip


def _score(bundle: Bundle, choice: Evaluate, progress: Progress) -> Score:
    session, wanted = open_session(bundle), METRICS[choice.task]

    def report(done: int, total: int) -> None:
        progress(f"{choice.task} on {_named(choice.labels)}", done, total)

    found = _evaluated(session, choice, report)
    whose = choice.label or None
    return next(score for score in found.scores if score.metric == wanted and score.label == whose)


def _named(labels: Path) -> str:
    """With its folder: many sets call theirs alike."""
    return "/".join(labels.parts[-2:])


def listed_by(choice: Evaluate) -> list[Source]:
    """Images of a labelled set; of pairs, the later ones."""
    if choice.task == "change":
        return [Source(name, pair[1]) for name, pair in read_pairs(choice.labels).items()]
    return list_inputs([choice.images])


def _evaluated(session: Session, choice: Evaluate, report: Callable[[int, int], None]) -> scored.Evaluation:
    labels, images, only = choice.labels, choice.images, choice.only
    if choice.task == "change":
        return scored.evaluate_change(session, labels, only, report)
    if not images:
        raise UsageError(f"[[evaluate]] of {choice.task} names no images", fix='add images = "FOLDER_OR_TAR"')
    if choice.task == "detect":
        rules = scored.LabelRules(choice.ignore, choice.alias)
        return scored.evaluate_detect(session, labels, images, only, rules, report)
    if choice.task == "caption":
        return scored.evaluate_caption(session, labels, images, only, report)
    if choice.task == "ask":
        return scored.evaluate_ask(session, labels, images, only, report)
    if choice.task == "segment":
        points = labelled_objects(labels, choice.label, False, only)
        return evaluate_segment(session, points, images, choice.label, RING_PX, report)
    return scored.evaluate_classify(session, labels, images, only, report)


def compare_answers(
    before: Bundle, after: Bundle, images: Sequence[Source], texts: Sequence[str],
    judged: Mapping[str, Sequence[Source]], progress: Progress,
) -> list[Check]:  # fmt: skip
    """Tasks against what they answered before, image by image; those ``judged`` by labels only in what has no labels:
    the tokens they write, and the vectors of what they see.

    A task that is judged writes of the images that judge it: of a scene unlike them no word is sure, before as after.
    """
    checks: list[Check] = []
    old, new, tasks = open_session(before), open_session(after), before.manifest.tasks
    written = isinstance(tasks.caption, GenerateTask) or isinstance(tasks.ask, GenerateTask)
    wanted = {
        "words": partial(_written, judged) if written else None,
        "answers": _classes if "ask" not in judged and isinstance(tasks.ask, AnswerTask) and tasks.ask.input else None,
        "boxes": _boxes if tasks.detect and "detect" not in judged else None,
        "embeddings": _embeddings if tasks.search else None,
    }
    for name, compare in wanted.items():
        if compare is not None:
            progress(name, 0, 1)
            checks += compare(old, new, images, texts or default_texts(before))
            progress(name, 1, 1)
    return checks


def default_texts(bundle: Bundle) -> tuple[str, ...]:
    """A sentence; of a bundle that takes only words that it learnt, some of these."""
    search = bundle.manifest.tasks.search
    if search is None or search.text.vocabulary is None:
        return (DEFAULT_TEXT,)
    words = sorted(read_vocabulary(bundle.path(search.text.vocabulary)))
    return tuple(words[:: -(-len(words) // DEFAULT_WORDS)])


def _tokens(verb: str, old: Session, new: Session, images: Sequence[Source], texts: Sequence[str]) -> list[Check]:
    """Share of the old answer's tokens that the new model would choose after those before them."""
    same, asked = 0, 0
    for index, image in enumerate(images):
        text = texts[index % len(texts)] if verb == "ask" else ""
        (writer, tiles), (reader, new_tiles) = (_writer(session, verb, image.path) for session in (old, new))
        answers = writer.tokens(tiles, text, Sampling(temperature=0.0, max_tokens=FOLLOWED_TOKENS))
        for tile, answer_T in zip(new_tiles, answers, strict=True):
            chosen_T = reader.follow(tile, text, answer_T).argmax(axis=1)
            same, asked = same + int((chosen_T == answer_T).sum()), asked + len(answer_T)
    return [Check(verb, "token agreement", same / max(asked, 1), AGREEMENT, at_least=True)]


def _writer(session: Session, verb: str, path: str) -> tuple[Generator | GgufGenerator, list[Prepared]]:
    """What writes greedily, and tiles of an image for it."""
    runtime, tiles = session.seen(verb, path, FOLLOWED_TILES)
    task = getattr(runtime.manifest.tasks, verb)
    if isinstance(task, GgufTask):
        return runtime.generator(verb, task), tiles
    assert isinstance(task, GenerateTask)
    return runtime.generator(f"{verb}, greedy", task.model_copy(update={"beams": 1})), tiles


def _written(
    judged: Mapping[str, Sequence[Source]], old: Session, new: Session, images: Sequence[Source], texts: Sequence[str]
) -> list[Check]:
    """One verb stands for all that are answered by the same decoder."""
    verb = next(v for v in ("caption", "ask") if isinstance(getattr(old.tasks, v), GenerateTask))
    return _tokens(verb, old, new, judged.get(verb, images), texts)


def _classes(old: Session, new: Session, images: Sequence[Source], texts: Sequence[str]) -> list[Check]:
    """Share of questions that get the old answer."""
    asked = [(image.path, texts[index % len(texts)]) for index, image in enumerate(images)]
    answers = [[session.ask(path, text, lambda *_: None).answer for path, text in asked] for session in (old, new)]
    same = float(np.mean([a == b for a, b in zip(*answers, strict=True)]))
    return [Check("ask", "loss to the answers before", 1 - same, LOSS[""][0])]


def _boxes(old: Session, new: Session, images: Sequence[Source], texts: Sequence[str]) -> list[Check]:
    """AP50 of the new boxes where the old ones are the truth."""
    task = old.tasks.detect
    labels = () if task is None or task.kind != "open_vocabulary" else tuple(texts)
    truth = [_truth(found) for found in (_detected(old, image, DetectQuery(labels)) for image in images)]
    found = [_detected(new, image, DetectQuery(labels, LEAST_SCORE)) for image in images]
    classes = sorted({box.label for boxes in truth for box in boxes if box.label})
    if not classes:
        return []
    scores = scoring.detection_scores(scoring.match_detections(truth, found, classes), LEAST_SCORE)
    value = next(score.value for score in scores if score.metric == "AP50" and score.label is None)
    # Boxes near the threshold come and go, which no label would count: the wider limit.
    return [Check("detect", "AP50 loss to the boxes before", 1 - value, LOSS[""][1])]


def _detected(session: Session, image: Source, query: DetectQuery) -> list[Found]:
    found: list[Found] = []

    def keep(record: dict[str, object], _: object) -> None:
        found.append(Found(str(record["label"]), float(record["score"]), tuple(record["box"])))  # type: ignore[arg-type]

    session.detect(image.path, query, keep)
    return found


def _truth(boxes: Sequence[Found]) -> list[Truth]:
    return [Truth(box.label, box.box) for box in boxes]


def _embeddings(old: Session, new: Session, images: Sequence[Source], texts: Sequence[str]) -> list[Check]:
    """Cosine of images' and of texts' vectors, the mean of each."""
    pictures = [_cosine(*(_mean_vector(session, image.path) for session in (old, new))) for image in images]
    words = [_cosine(*(session.embed_text(text) for session in (old, new))) for text in texts]
    return [
        Check(f"search of {what}", "cosine", float(np.mean(found)), COSINE, at_least=True)
        for what, found in (("images", pictures), ("texts", words))
    ]


def _mean_vector(session: Session, path: str) -> NDArray[np.float64]:
    mean_D = session.embed(path, lambda *_: None).mean_D
    assert mean_D is not None
    return mean_D


def _cosine(a_D: NDArray[np.floating], b_D: NDArray[np.floating]) -> float:
    return float(a_D @ b_D / max(float(np.linalg.norm(a_D) * np.linalg.norm(b_D)), 1e-24))
