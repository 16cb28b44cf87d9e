from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_rsvlm.cli.common import make_limits, open_session, plan_options, progress_bar

if TYPE_CHECKING:
    from edge_rsvlm.bundle import Bundle
    from edge_rsvlm.evaluate import Evaluation
    from edge_rsvlm.pipeline.outcome import Progress
    from edge_rsvlm.pipeline.session import Session
    from edge_rsvlm.scoring import Score

    Evaluate = Callable[[Session, Path, str, Path | None, Progress | None], Evaluation]

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
only_option = click.option(
    "--only",
    type=click.Path(path_type=Path),
    metavar="NAMES.txt",
    help="Score these alone: one name per line, # for comments.",
)
images_option = click.option("--images", required=True, metavar="FOLDER_OR_TAR", help="Where the images are.")
ALL = "all"
SHOWN = ("metric", "value", "interval", "samples", "label")


@click.group("eval")
def command() -> None:
    """Score a bundle on labelled images, whole, as users run it. Every score has a bootstrap 95 % interval.

    Needs pip install 'edge-rsvlm[eval]'.
    """


def labelled(labels: str) -> Callable[[Callable[[], Evaluate]], click.Command]:
    """Makes a verb, of the function's name and docstring, that scores a file of labels of images by what it returns."""

    def verb(scorer: Callable[[], Evaluate]) -> click.Command:
        @click.argument("labels", metavar=labels, type=click.Path(path_type=Path))
        @images_option
        @only_option
        @plan_options
        @json_option
        def score(
            labels: Path, images: str, only: Path | None, as_json: bool, bundle: Path | None, allow_unsigned: bool,
            **limits: Any,
        ) -> None:  # fmt: skip
            session = open_session(bundle, allow_unsigned, make_limits(**limits), (task,))
            with progress_bar(labels.name, "images") as progress:
                found = scorer()(session, labels, images, only, progress)
            _report(found, str(labels), session.bundle, as_json)

        task = scorer.__name__
        return command.command(task, help=scorer.__doc__)(score)

    return verb


@command.command("detect")
@click.argument("annotations", type=click.Path(path_type=Path))
@images_option
@only_option
@click.option("--ignore", multiple=True, metavar="LABEL", help="What lies on these boxes counts neither way.")
@click.option("--alias", multiple=True, metavar="FROM=TO", help="Score label FROM, labelled or detected, as TO.")
@click.option("--like", metavar="LABEL", help="Score this category alone, found by examples of it.")
@click.option("--examples", type=click.IntRange(1, 1000), help="Boxes drawn for --like.  [default: 5]")
@click.option("--draws", type=click.IntRange(1, 1000), help="How often they are drawn for --like.  [default: 10]")
@plan_options
@json_option
def detect(
    annotations: Path, images: str, only: Path | None, ignore: tuple[str, ...], alias: tuple[str, ...],
    like: str | None, examples: int | None, draws: int | None, as_json: bool, bundle: Path | None,
    allow_unsigned: bool, **limits: Any,
) -> None:  # fmt: skip
    """AP50 and AP50:95, and rates at the bundle's threshold.

    ANNOTATIONS is a COCO file. AP counts all detections from score 0.05 on, rates match at IoU 0.5. "all" is
    the mean AP over classes with boxes, and the rates of their pooled counts.

    With --like it is AP50 of one category by examples of it, on the images that gave none: the mean over draws, and
    the middle 95 % of them.
    """
    from edge_rsvlm.errors import UsageError
    from edge_rsvlm.evaluate import LabelRules, evaluate_detect
    from edge_rsvlm.evaluate.few_shot import FewShot, evaluate_few_shot

    rules = LabelRules(ignore, _aliases(alias))
    if like is None and (examples or draws):
        raise UsageError("--examples and --draws are for --like", fix="add --like LABEL")
    session = open_session(bundle, allow_unsigned, make_limits(**limits), ("detect",))
    if like is not None:
        wanted = FewShot(like, examples or 5, draws or 10)
        with progress_bar(annotations.name, "draws") as progress:
            found = evaluate_few_shot(session, annotations, images, only, rules, wanted, progress)
        _report(found, str(annotations), session.bundle, as_json)
        return
    with progress_bar(annotations.name, "images") as progress:
        found = evaluate_detect(session, annotations, images, only, rules, progress)
    _report(found, str(annotations), session.bundle, as_json)


@command.command("change")
@click.argument("folder", type=click.Path(path_type=Path))
@only_option
@plan_options
@json_option
def change(
    folder: Path, only: Path | None, as_json: bool, bundle: Path | None, allow_unsigned: bool, **limits: Any
) -> None:
    """Precision, recall and F1 of changed pixels, per pair and pooled.

    FOLDER holds a folder per pair, with images t1, t2 and change (bright where something changed).
    """
    from edge_rsvlm.evaluate import evaluate_change

    session = open_session(bundle, allow_unsigned, make_limits(**limits), ("change",))
    with progress_bar(folder.name, "pairs") as progress:
        found = evaluate_change(session, folder, only, progress)
    _report(found, str(folder), session.bundle, as_json)


@labelled("CAPTIONS")
def caption() -> Evaluate:
    """CIDEr and BLEU-4 of captions.

    CAPTIONS has a line {"image": "name", "captions": ["...", ...]} per image. Both sides are lower-cased and lose their
    punctuation, instead of the Java tokeniser that other reports may use.
    """
    from edge_rsvlm.evaluate import evaluate_caption

    return evaluate_caption


@labelled("QUESTIONS")
def ask() -> Evaluate:
    """Share of questions answered right, per type and all together.

    QUESTIONS has a line {"image": "name", "questions": [{"question": "...", "answer": "...", "type": "..."}, ...]} per
    image; types are optional. An answer is right if it equals the labelled one but for case and punctuation.
    """
    from edge_rsvlm.evaluate import evaluate_ask

    return evaluate_ask


@labelled("PHRASES")
def ground() -> Evaluate:
    """Pr@0.5: share of phrases whose boxes are found at an IoU of 0.5.

    PHRASES has a line {"image": "name", "phrases": [{"phrase": "...", "boxes": [[x, y, width, height], ...]}, ...]} per
    image. Of the answered boxes, the first count, as many as the phrase means.
    """
    from edge_rsvlm.evaluate.ground import evaluate_ground

    return evaluate_ground


@labelled("CAPTIONS")
def search() -> Evaluate:
    """Recall at 1, 5 and 10 between images and captions, both ways, and their mean, in percent.

    CAPTIONS has a line {"image": "name", "captions": ["...", ...]} per image. A caption that another image has too
    counts as a miss there.
    """
    from edge_rsvlm.evaluate.search import evaluate_search

    return evaluate_search


@labelled("LABELS")
def classify() -> Evaluate:
    """Share of images whose best class is the labelled one, per class and all together.

    LABELS has a line {"image": "name", "label": "airport"} per image; its labels are the classes to choose from.
    """
    from edge_rsvlm.evaluate import evaluate_classify

    return evaluate_classify


@command.command("segment")
@click.argument("labels", type=click.Path(path_type=Path))
@images_option
@only_option
@click.option("--label", required=True, help="The word whose mask is scored.")
@click.option("--boxes", is_flag=True, help="LABELS is a COCO file, with boxes of the category --label.")
@click.option(
    "--ring",
    default="8,16",
    show_default=True,
    metavar="INNER,OUTER",
    help="Distances from an object in pixels: half way between is not to be in the mask.",
)
@plan_options
@json_option
def segment(
    labels: Path, images: str, only: Path | None, label: str, boxes: bool, ring: str, as_json: bool,
    bundle: Path | None, allow_unsigned: bool, **limits: Any,
) -> None:  # fmt: skip
    """Balanced accuracy of a mask on objects and around them.

    LABELS has a line {"image": "name", "points": [[x, y], ...]} per image, in pixels. Balanced accuracy is the mean of
    recall, the share of points (or centres of boxes) in the mask, and of specificity, the share of places around them
    that are not. Those are 16 per object, on a ring around it; places closer than INNER to any object do not count.
    """
    from edge_rsvlm.evaluate.segment import evaluate_segment, labelled_objects

    ring_px = _ring(ring)
    session = open_session(bundle, allow_unsigned, make_limits(**limits), ("segment",))
    truth = labelled_objects(labels, label, boxes, only)
    with progress_bar(labels.name, "images") as progress:
        found = evaluate_segment(session, truth, images, label, ring_px, progress)
    _report(found, str(labels), session.bundle, as_json)


def _ring(text: str) -> tuple[float, float]:
    from edge_rsvlm.errors import UsageError

    try:
        inner, outer = (float(part) for part in text.split(","))
    except ValueError as exc:
        raise UsageError(f"--ring '{text}' is not two numbers", fix="write it like 8,16") from exc
    if not 0 <= inner <= outer:
        raise UsageError(f"--ring '{text}' is no ring", fix="write the smaller distance first")
    return inner, outer


def _aliases(items: Sequence[str]) -> dict[str, str]:
    from edge_rsvlm.errors import UsageError

    pairs = [item.partition("=") for item in items]
    for item, (old, equals, new) in zip(items, pairs, strict=True):
        if not (old and equals and new):
            raise UsageError(f"--alias '{item}' renames nothing", fix="write it like plane=airplane")
    return {old: new for old, _, new in pairs}


def _report(found: Evaluation, data: str, bundle: Bundle, as_json: bool) -> None:
    if found.not_scored:
        names = ", ".join(found.not_scored)
        click.echo(f"not scored, since the bundle does not know them: {names}; --alias or --ignore them", err=True)
    if as_json:
        click.echo(json.dumps(_record(found, data, bundle), ensure_ascii=False))
        return
    unit = "pairs" if found.task == "change" else "images"
    manifest = bundle.manifest
    click.echo(f"{found.task} on {data}: {found.samples} {unit}, {manifest.name} version {manifest.version}")
    click.echo(_table(found.scores))


def _record(found: Evaluation, data: str, bundle: Bundle) -> dict[str, Any]:
    return {
        "task": found.task,
        "data": data,
        "bundle": bundle.manifest.name,
        "version": bundle.manifest.version,
        "samples": found.samples,
        "scores": [{name: getattr(score, name) for name in SHOWN} for score in found.scores],
        "not_scored": list(found.not_scored),
    }


def _table(scores: Sequence[Score]) -> str:
    """A row per label, a column per metric."""
    metrics = list(dict.fromkeys(score.metric for score in scores))
    labels = list(dict.fromkeys(score.label for score in scores))
    cells = {(score.label, score.metric): _cell(score) for score in scores}
    width = max(len(label or ALL) for label in labels)
    rows = [(" " * width, metrics), *((label or ALL, [cells[label, metric] for metric in metrics]) for label in labels)]
    return "\n".join(f"{label:<{width}}  " + "".join(f"{cell:<23}" for cell in row).rstrip() for label, row in rows)


def _cell(score: Score) -> str:
    if score.interval is None:
        return f"{score.value:.3f}"
    low, high = score.interval
    return f"{score.value:.3f} [{low:.3f}, {high:.3f}]"
