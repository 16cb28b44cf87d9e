"""Train the default model: ``python -m edge_rsvlm.export.default.train`` runs every stage that is not done yet.

Each stage ends in an artifact under ``--work``; a stage whose artifact matches its configuration is skipped, and an
interrupted one goes on from its last checkpoint. A GPU is used where there is one. Times are minutes of one processor
core or of the GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.stages import appearance, backbone, language, match, refer, vision

STAGES = (backbone.NAME, vision.NAME, appearance.NAME, match.NAME, language.NAME, refer.NAME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the data sets")
    parser.add_argument("--work", type=Path, default=Path("build/train"), help="artifacts, checkpoints and caches")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    parser.add_argument("--minutes-scale", type=float, default=1.0, help="multiplies the time of every training stage")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    train(options.data, options.work, options.until, options.minutes_scale)


def train(data: Path, work: Path, until: str, scale: float) -> None:
    """Every stage up to ``until``; ``scale`` multiplies the minutes of each."""

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
    report(language.run(data, work, scaled(language.DEFAULTS), imported, seen))
    if until == language.NAME:
        return
    report(refer.run(data, work, scaled(refer.DEFAULTS), imported))


def report(done: artifact.Artifact) -> artifact.Artifact:
    figures = {name: value for name, value in done.metrics.items() if not isinstance(value, list)}
    print(f"{done.folder.name}: {json.dumps(figures)}", flush=True)
    return done


if __name__ == "__main__":
    main()
