"""The model card: what the default model is, what it was trained on, what it scores, where it fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_rsvlm.export.default.baselines import NEIGHBOURS, Baselines
from edge_rsvlm.export.default.data.objects import CLASSES, QUERIES
from edge_rsvlm.export.default.describe import Thresholds
from edge_rsvlm.export.default.robustness import Loss
from edge_rsvlm.export.default.truth import Truth

CARD_NAME = "MODEL_CARD.md"

TEXT = """# {name}

One visual encoder (MobileNetV2 1.0, ImageNet-initialised, five-channel stem: red, green, blue, near infrared, validity)
computes features once; everything else is a small head that reads them:

- boxes (`detect`): each cell of a map at stride 4 has a vector, which is compared with that of a word. Without words it
  looks for {classes}.
- boxes by examples (`detect --like`): whatever looks a little like one of these classes is compared with the examples,
  each turned in eight ways, by the encoder's features in its box and by its size.
- masks (`segment`): a map at stride 8, compared with words in the same way. Experimental.
- scenes (`classify`, `index`, `search`): one vector per image, compared with those of texts.
- change between two dates (`change`).
- phrases (`ground`): a small network that reads a phrase and what `detect` found, and chooses among these.
- sentences (`caption`, `ask`): a 4-layer Llama-architecture decoder that writes.

A small text encoder gives the vectors of words. It knows the words of its training and no others, and a text with
another word is refused rather than guessed at: {counts}. The words for objects are

{queries}.

*Bus* was left out of all words and boxes on purpose: it shows what examples (`detect --like`) find that words were
never taught.

Graphs as stored: {precisions}.
Those for TensorRT ({tensorrt}) were compiled without a GPU and never run on one. Made by
`python -m edge_rsvlm.export.default.train` and `python -m edge_rsvlm.export.default.make_bundle`, on a CPU.

## Licence and training data

{licence}. Trained on:

{data}

Nothing listed in `export/default/held_out/`, no image of UCM-Captions' validation part, and no UCM image that shows
the same place as one of those ({facts.left_out} of them) was trained on. The official test splits were not available.

## Scores

Through the whole pipeline, with bootstrap 95 % intervals over images (where examples were drawn: the middle 95 % of the
draws). Shares are of 1, recalls of search in percent. All images were held out, but for buses by examples: the images
were trained on, with every bus an area that nothing is learnt of.

| data | measure | value | 95 % interval | images or draws |
|---|---|---|---|---|
{scores}

Where scores are cut was chosen beforehand: for words ({facts.thresholds.detect:.3g}) and examples
({facts.thresholds.like:.3g}) on crops of training images, for change ({facts.thresholds.change:.3g}) on held-out
cities: what the others choose is {others}. That Sentinel-2 pairs are compared at 6.4 m, the coarse end of the
resolutions trained on, and that a pair's probabilities are averaged with those of its mirror image, was chosen on these
two cities as well: take their score as a little too high.

Simple baselines on the same images (`python -m edge_rsvlm.export.default.baselines`):

| what | measure | baseline |
|---|---|---|
| captions of UCM: the consensus of the {neighbours} nearest training images | CIDEr | {facts.baselines.ucm.cider:.3f} |
| captions of UCM: the same | BLEU-4 | {facts.baselines.ucm.bleu4:.3f} |
| captions of RSICD: the same | CIDEr | {facts.baselines.rsicd.cider:.3f} |
| captions of RSICD: the same | BLEU-4 | {facts.baselines.rsicd.bleu4:.3f} |
| classes: that of the nearest training image | accuracy | {facts.baselines.classes:.3f} |
| questions: the usual answer to the same question | accuracy | {facts.baselines.answers:.3f} |
| change of the OSCD cities: smoothed change vectors, cut where it is best | F1 | {facts.baselines.change:.3f} |

Nearness is that of ImageNet MobileNetV2 features.

What captions name, against UC Merced's 17 multi-labels (`python -m edge_rsvlm.export.default.truth`):

| captions of the validation part | precision | recall |
|---|---|---|
{told}

What worse images cost, as a share of the score on the same images as they are (UCM-Captions' validation part, CIDEr;
held-out HRPlanes, AP50; `python -m edge_rsvlm.export.default.robustness`):

| images | captions | airplanes |
|---|---|---|
{losses}

{costs}## Commands

They reproduce the rows, from the project's root:

```
python -m edge_rsvlm.export.default.data.eval_sets
{commands}
```

## Training

{training}

## Limits and known failures

Pictures of the worst captions and images: `python -m edge_rsvlm.export.default.failure_pictures`.

- Few images stand behind several rows: read the intervals, not the values.
- Words are those of UCM-Captions, RSICD and RSIVQA, many of them misspelt in the source, and the names of the objects
  above. Captions name what scenes of these sets show; numbers above a handful are guesses.
- Questions are of the kinds that RSIVQA asks about UC Merced: whether something is there, how many there are, where it
  is, and what the picture is about. Others get an answer of these kinds too.
- Phrases are of the kinds that training made up by rule: kinds of object, and where they lie in the image and to each
  other. What `detect` does not find cannot be chosen.
- Masks were learnt from labels of whole images, from boxes, and from points on trees: they are coarse, and their edges
  mean little.
- Boxes seen in training: {boxes}. Images had about 0.1 to 1 m per pixel; coarser ones were not tried.
- Change brings the earlier date to the radiometry of the later one, from statistics of the whole scene: where most of a
  small scene changed, that hides part of it.
- Change was trained on a few cities (Sentinel-2, 10 m) and old aerial photographs. It has learnt buildings and
  earthworks, not floods, fires or harvests; the season of both dates should agree.
- Near infrared was seen in Sentinel-2 pairs only; all but change uses red, green and blue.
"""


@dataclass(frozen=True)
class CardFacts:
    """What the card tells. ``fields`` are those of the manifest, ``stages`` the manifests of the artifacts.

    ``told`` is what captions name, by who wrote them; ``losses`` are those of worse images. ``left_out`` counts UCM
    images too much like a validation image, ``boxes`` those of training by what they show, ``words`` those of each list
    that texts are held against.
    """

    fields: Mapping[str, Any]
    stages: Sequence[dict[str, Any]]
    thresholds: Thresholds
    baselines: Baselines
    told: Mapping[str, Truth]
    losses: Sequence[Loss]
    left_out: int
    boxes: Mapping[str, int]
    words: Mapping[str, int]


def write_card(path: Path, facts: CardFacts) -> None:
    fields = facts.fields
    text = TEXT.format(
        facts=facts,
        name=fields["name"],
        precisions=", ".join(f"`{name}` {graph['precision']}" for name, graph in fields["graphs"].items()),
        tensorrt=", ".join(name for name, graph in fields["graphs"].items() if graph["tensorrt"]) or "none",
        costs=_costs(fields.get("comparisons", ())),
        licence=fields["licence"][0].upper() + fields["licence"][1:],
        classes=", ".join(CLASSES),
        counts=", ".join(f"{count} words {name}" for name, count in facts.words.items()),
        queries="; ".join(", ".join(query.words) for query in QUERIES),
        boxes=", ".join(f"{name} {count:,}" for name, count in facts.boxes.items()),
        neighbours=NEIGHBOURS,
        told="\n".join(f"| {who} | {t.precision:.3f} | {t.recall:.3f} |" for who, t in facts.told.items()),
        losses="\n".join(_losses(facts.losses)),
        data="\n".join(f"- {item}" for item in fields["training_data"]),
        scores="\n".join(map(_row, fields["accuracy"])),
        others=", ".join(f"{cut:.2f} for {city}" for city, cut in facts.thresholds.change_by_others.items()),
        commands="\n".join(dict.fromkeys(row["command"] for row in fields["accuracy"])),
        training="\n".join(map(_stage, facts.stages)),
    )
    path.write_text(text, encoding="utf-8")


def _row(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"| {row['data']} | {row['metric']} | {row['value']:.3f} | {low:.3f} - {high:.3f} | {row['samples']} |"


def _losses(losses: Sequence[Loss]) -> Iterator[str]:
    """A line for each way to degrade, with what it costs each task."""
    relative = {(loss.degradation, loss.task): loss.relative for loss in losses}
    for how in dict.fromkeys(loss.degradation for loss in losses):
        yield f"| {how} | {relative[how, 'caption']:.1%} | {relative[how, 'detect']:.1%} |"


def _costs(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """What fewer bits cost, on the same images before and after."""
    if not comparisons:
        return ""
    rows = [
        f"| {c['task']} | {c['data']} | {c['metric']} | {c['before']:.3f} | {c['after']:.3f} | {c['loss']:.3f} |"
        f" {c['bound']:.3f} |"
        for c in comparisons
    ]
    head = "| task | labels | measure | half precision | as shipped | loss | at most (95 %) |\n" + "|---" * 7 + "|"
    return "\n".join(["## What fewer bits cost", "", "On the same images:", "", head, *rows]) + "\n\n"


def _stage(manifest: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in manifest["config"].items())
    steps = manifest["metrics"].get("steps")
    return f"- `{manifest['stage']}`: {'nothing is trained' if steps is None else f'{steps:.0f} steps'} ({settings})"
