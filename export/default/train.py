"""Train the default model: ``python -m edge_rsvlm.export.default.train`` runs every stage that is not done yet.

Each stage ends in an artifact under ``--work``; a stage whose artifact matches its configuration is skipped, and an
interrupted one goes on from its last checkpoint. A GPU is used where there is one. Times are minutes of one processor
core or of the GPU.

``make model`` does all that makes the packaged bundle anew: this, the thresholds, the export, the scores and the card.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.stages import appearance, backbone, language, match, refer, vision

WEIGHTS = Path(__file__).parent / "weights"
STAGES = (backbone.NAME, vision.NAME, appearance.NAME, match.NAME, language.NAME, refer.NAME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the data sets")
    parser.add_argument("--work", type=Path, default=Path("build/train"), help="artifacts, checkpoints and caches")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    parser.add_argument("--minutes-scale", type=float, default=1.0, help="multiplies the time of every training stage")
    parser.add_argument(
        "--teachers", action="store_true", help="the decoder learns from several: twice the time in all"
    )
    parser.add_argument("--adopt", action="store_true", help="what was trained replaces export/default/weights")
    options = parser.parse_args()
    if options.adopt and options.until != STAGES[-1]:
        parser.error("--adopt takes the weights of all stages: leave --until out")
    options.work.mkdir(parents=True, exist_ok=True)
    train(options.data, options.work, options.until, options.minutes_scale, with_teachers=options.teachers)
    if options.adopt:
        adopt(options.work, WEIGHTS)


def train(data: Path, work: Path, until: str, scale: float, *, with_teachers: bool = False) -> None:
    """Every stage up to ``until``; ``scale`` multiplies the minutes of each.

    ``with_teachers`` the decoder is the student of others, which are trained first.
    """

    def scaled(defaults: dict[str, Any]) -> dict[str, Any]:
        return {"minutes": defaults["minutes"] * scale}

    imported = report(backbone.run(data, work, {}))
    if until == backbone.NAME:
        return
    seen = report(vision.run(data, work, scaled(vision.DEFAULTS), imported))
    if until == vision.NAME:
        return
    report(appearance.run(data, work, {}, seen))
    if until == appearance.NAME:
        return
    report(match.run(data, work, scaled(match.DEFAULTS), imported, seen))
    if until == match.NAME:
        return
    decoder = partial(language.run, data, work, backbone=imported, vision=seen)
    teachers = [
        report(decoder(own | scaled(language.DEFAULTS | own), name=f"teacher-{n}"))
        for n, own in enumerate(language.TEACHERS if with_teachers else ())
    ]
    report(decoder(scaled(language.TAUGHT if teachers else language.DEFAULTS), teachers=teachers))
    if until == language.NAME:
        return
    report(refer.run(data, work, scaled(refer.DEFAULTS), imported))


def adopt(work: Path, weights: Path) -> None:
    """The finished stages of ``work`` in place of those in ``weights``; of the backbone, what it says of itself."""
    for stage in STAGES:
        shutil.rmtree(weights / stage, ignore_errors=True)
        leave = shutil.ignore_patterns("*.safetensors") if stage == backbone.NAME else None
        shutil.copytree(work / stage, weights / stage, ignore=leave)


def report(done: artifact.Artifact) -> artifact.Artifact:
    figures = {name: value for name, value in done.metrics.items() if not isinstance(value, list)}
    print(f"{done.folder.name}: {json.dumps(figures)}", flush=True)
    return done


if __name__ == "__main__":
    main()
