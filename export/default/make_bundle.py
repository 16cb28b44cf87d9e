"""Trained artifacts -> the packaged bundle: exported by RECIPE.toml, scored, with its card and its hash.

``python -m edge_rsvlm.export.default.make_bundle`` takes the stages of ``export/default/weights``; ``--target`` makes
another variant of the same model elsewhere.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_rsvlm.config.manifest import MANIFEST_NAME
from edge_rsvlm.export import artifact
from edge_rsvlm.export.bundle_writer import bundle_folder, write_manifest
from edge_rsvlm.export.chain import run_export
from edge_rsvlm.export.default.baselines import baselines
from edge_rsvlm.export.default.checkpoint import STAGES
from edge_rsvlm.export.default.data.eval_sets import write_label_files
from edge_rsvlm.export.default.data.objects import boxes_learnt
from edge_rsvlm.export.default.describe import objects_vocabulary, phrases_vocabulary, read_thresholds
from edge_rsvlm.export.default.family import CUT_STAGES
from edge_rsvlm.export.default.model_card import CARD_NAME, CardFacts, write_card
from edge_rsvlm.export.default.robustness import losses
from edge_rsvlm.export.default.score import BY_EXAMPLES, EVALUATIONS, LABELS, evaluations
from edge_rsvlm.export.default.stages import backbone, language
from edge_rsvlm.export.default.truth import truth_of_bundle, truth_of_people
from edge_rsvlm.export.recipe import Recipe, load_recipe

RECIPE = Path(__file__).parent / "RECIPE.toml"
MOST_BYTES = 12 << 20
WORK = Path("build/default")


def export(folder: Path, target: str | None, data: Path, report: Callable[[str, int, int], None]) -> Path:
    """The bundle as the recipe says, below ``folder``; or of another ``target``, whatever that costs.

    It is judged by label files that are made of ``data`` first.
    """
    write_label_files(data, Path(LABELS))
    recipe = load_recipe(RECIPE)
    changed: dict[str, Any] = {"out": folder / "bundle", "work": WORK / "steps"}
    if target is not None:
        changed |= {"target": target, "precision": {}, "engines": ("onnxruntime",), "allow": ("accuracy",)}
    return run_export(Recipe.model_validate(recipe.model_dump() | changed), report)


def publish(made: Path, weights: Path, data: Path, out: Path) -> int:
    """Score the bundle ``made``, write its card, and put it to ``out`` with its hash beside it; returns its bytes."""
    fields: dict[str, Any] = json.loads((made / MANIFEST_NAME).read_text())
    del fields["files"], fields["schema_version"]
    fields["accuracy"] = evaluations(data, made, rows=(*EVALUATIONS, *BY_EXAMPLES))
    with bundle_folder(out) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
        write_card(folder / CARD_NAME, _facts(fields, weights, data, made))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > MOST_BYTES:
            raise ValueError(f"the bundle holds {size} bytes; it may hold {MOST_BYTES}")
        write_manifest(folder, fields)
    digest = artifact.file_hash(out / MANIFEST_NAME)
    out.with_name(f"{out.name}.sha256").write_text(digest + "\n")
    return size


def _facts(fields: dict[str, Any], weights: Path, data: Path, made: Path) -> CardFacts:
    stages = {name: artifact.load(weights / name) for name in STAGES}
    beaten = baselines(data, weights, WORK / "cache")
    scenes = (weights / language.NAME / language.VOCABULARY_NAME).read_text().split()
    return CardFacts(
        fields,
        [stage.manifest for stage in stages.values()],
        read_thresholds(weights, [stages[name] for name in CUT_STAGES]),
        beaten,
        {
            "this model": truth_of_bundle(data, made),
            "the consensus of the nearest images": beaten.told,
            "a person, the first of five": truth_of_people(data),
        },
        list(losses(data, made, WORK / "worse")),
        len(artifact.load(weights / backbone.NAME).metrics["ucm_left_out"]),
        boxes_learnt(data),
        {
            "for objects": len(objects_vocabulary()),
            "in phrases": len(phrases_vocabulary()),
            "for scenes and in questions": len(scenes),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="labelled data for the evaluation")
    parser.add_argument("--target", help="instead of that of RECIPE.toml, as `edge-rsvlm export run --target`")
    parser.add_argument("--out", type=Path, default=Path("edge_rsvlm/bundles/default"))
    options = parser.parse_args()
    made = export(WORK, options.target, options.data, lambda *at: print(*at, flush=True))
    size = publish(made, RECIPE.parent / "weights", options.data, options.out)
    print(f"{options.out}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
