"""Train the default model: ``python -m edge_rsvlm.export.default.train`` runs every stage that is not done yet.

Each stage ends in an artifact under ``--work``; a stage whose artifact matches its configuration is skipped, and an
interrupted one goes on from its last checkpoint. A GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.stages import backbone, caption, change, joint

STAGES = (backbone.NAME, joint.NAME, change.NAME, caption.NAME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the data sets")
    parser.add_argument("--work", type=Path, default=Path("build/train"), help="artifacts, checkpoints and caches")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    parser.add_argument("--minutes-scale", type=float, default=1.0, help="multiplies the time of every training stage")
    options = parser.parse_args()

    def scaled(defaults: dict[str, float]) -> dict[str, float]:
        return {"minutes": defaults["minutes"] * options.minutes_scale}

    options.work.mkdir(parents=True, exist_ok=True)
    imported = report(backbone.run(options.data, options.work, {}))
    if options.until == backbone.NAME:
        return
    trained = report(joint.run(options.data, options.work, scaled(joint.DEFAULTS), imported))
    if options.until == joint.NAME:
        return
    report(change.run(options.data, options.work, scaled(change.DEFAULTS), trained))
    if options.until == change.NAME:
        return
    report(caption.run(options.data, options.work, scaled(caption.DEFAULTS), trained))


def report(done: artifact.Artifact) -> artifact.Artifact:
    figures = {name: value for name, value in done.metrics.items() if not isinstance(value, list)}
    print(f"{done.folder.name}: {json.dumps(figures)}", flush=True)
    return done


if __name__ == "__main__":
    main()
