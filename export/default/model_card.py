"""The model card: what the default model is, what it was trained on, what it scores, where it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_rsvlm.export.default.baselines import ConsensusScore
from edge_rsvlm.export.default.describe import Thresholds
from edge_rsvlm.export.default.model.detect import CLASSES

CARD_NAME = "MODEL_CARD.md"

TEXT = """# {name}

One visual encoder (MobileNetV2 1.0, ImageNet-initialised, five-channel stem: red, green, blue, near infrared, validity)
with three heads: boxes, change between two dates, and a 4-layer Llama-architecture decoder that writes captions.
Classes of boxes: {classes}.

Graphs as stored: {precisions}.
Those for TensorRT ({tensorrt}) were compiled without a GPU and never run on one. Made by
`python -m edge_rsvlm.export.default.train` and `python -m edge_rsvlm.export.default.make_bundle`, on a CPU.

## Licence and training data

{licence}. Trained on:

{data}

Nothing listed in `export/default/held_out/`, no image of UCM-Captions' validation part, and no UCM image that shows
the same place as one of those ({facts.left_out} of them) was trained on. The official test splits were not available.

## Scores

On held-out images, through the whole pipeline, with bootstrap 95 % intervals over images. The threshold of boxes
({facts.thresholds.detect:.3g}) was chosen on crops of training images, that of change
({facts.thresholds.change:.3g}) on held-out cities: what the others choose is {others}.
That Sentinel-2 pairs are compared at 6.4 m, the coarse end of the resolutions trained on, and that a pair's
probabilities are averaged with those of its mirror image, was chosen on these two cities as well: take their score as a
little too high.

| data | measure | value | 95 % interval | images |
|---|---|---|---|---|
{scores}

{costs}Simple baselines on the same images (`python -m edge_rsvlm.export.default.baselines`): the consensus of the
captions of the five nearest training images (ImageNet MobileNetV2 features) has CIDEr {facts.consensus.cider:.2f}
and BLEU-4 {facts.consensus.bleu4:.3f}; smoothed change vector analysis on the OSCD cities, at its best possible
threshold, has F1 {facts.change_vectors:.3f}.

Commands that reproduce the rows:

```
{commands}
```

## Training

{training}

## Limits

- Few images stand behind several rows: read the intervals, not the values.
- Captions speak the language of UCM-Captions and RSICD: about 2,300 words, many of them misspelt in the source. They
  name what scenes of these sets show; numbers above a handful are guesses.
- Boxes seen in training: airplane 5,369, car 1,237, van 209, truck 199, boat 183, bus 123, helicopter 6. Scored above
  are only airplanes, and vehicles as one class. Images had about 0.1 to 1 m per pixel; coarser ones were not tried.
- Change brings the earlier date to the radiometry of the later one, from statistics of the whole scene: where most of a
  small scene changed, that hides part of it.
- Change was trained on a few cities (Sentinel-2, 10 m) and old aerial photographs. It has learnt buildings and
  earthworks, not floods, fires or harvests; the season of both dates should agree.
- Near infrared was seen in Sentinel-2 pairs only; boxes and captions use red, green and blue.
"""


@dataclass(frozen=True)
class CardFacts:
    """What the card tells. ``fields`` are those of the manifest, ``stages`` the manifests of the artifacts.

    ``change_vectors`` is the F1 of that baseline; ``left_out`` counts UCM images too much like a validation image.
    """

    fields: Mapping[str, Any]
    stages: Sequence[dict[str, Any]]
    thresholds: Thresholds
    consensus: ConsensusScore
    change_vectors: float
    left_out: int


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
    return "\n".join(["What fewer bits cost, on the same images:", "", head, *rows]) + "\n\n"


def _stage(manifest: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in manifest["config"].items())
    return f"- `{manifest['stage']}`: {manifest['metrics']['steps']:.0f} steps ({settings})"
