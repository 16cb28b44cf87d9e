"""The default model, untrained, as its stages leave it."""

from __future__ import annotations

from pathlib import Path

import torch

from edge_rsvlm.export import artifact
from edge_rsvlm.export.default.data.objects import CLASSES
from edge_rsvlm.export.default.describe import Thresholds, write_thresholds
from edge_rsvlm.export.default.family import CUT_STAGES
from edge_rsvlm.export.default.model.appearance import Appearance
from edge_rsvlm.export.default.model.decoder import DecoderConfig
from edge_rsvlm.export.default.model.language import Language
from edge_rsvlm.export.default.model.refer import Refer
from edge_rsvlm.export.default.stages.features import tokenizer_of
from edge_rsvlm.export.default.stages.match import Match
from edge_rsvlm.export.default.stages.vision import Vision
from edge_rsvlm.tasks.refer import feature_count

SAID = ("two ships in the sea", "many airplanes at an airport", "trees", "does this picture contain trees", "yes")
WORDS = sorted({word for said in SAID for word in said.split()})
CUTS = Thresholds(detect=0.01, like=0.5, change=0.45)
"""Low enough for objects in noise."""


def write_stages(folder: Path) -> Path:
    """With heads and norms that are not at their first, flat values."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(SAID)
    size = tokenizer.get_vocab_size()
    modules = {"vision": Vision(), "appearance": Appearance(), "match": Match(size, 0.1),
               "language": Language(DecoderConfig(size)),
               "refer": Refer(size, feature_count(len(CLASSES)))}  # fmt: skip
    texts = {"tokenizer.json": tokenizer.to_str(), "vocabulary.txt": "".join(f"{word}\n" for word in WORDS)}
    made = {}
    for name, module in modules.items():
        for key, values in module.state_dict().items():
            if key.endswith("mean"):
                values.normal_(0, 0.1)
            elif key.endswith(("running_var", "deviation")):
                values.uniform_(0.5, 2)
            elif key.endswith(("contrast.weight", "sides.weight", "out.weight")):
                values.normal_(0, 0.1)
        digest = artifact.stage_hash(name, {}, [])
        state, more = module.state_dict(), texts if name == "language" else None
        made[name] = artifact.write(folder / name, name, digest, {}, {}, state, more)
    cuts = CUTS
    write_thresholds(folder, [made[name] for name in CUT_STAGES], cuts)
    return folder
