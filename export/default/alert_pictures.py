"""Ten alerts to look at, as one picture: ``python -m edge_rsvlm.export.default.alert_pictures``.

The strongest alert of each pair of dates, in order of their scores: of aerial images of towns (NAIP, with trees, CC BY
4.0, Ventura et al. 2022) and of a river (Landsat, public domain). Nothing is chosen by hand.
"""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from edge_rsvlm.bundle import load_bundle, packaged_folder
from edge_rsvlm.config.rules import load_rules
from edge_rsvlm.pipeline.alerting import compare, scene_time
from edge_rsvlm.pipeline.session import Limits, Session
from edge_rsvlm.raster.inputs import Source
from edge_rsvlm.report.drawing import PNG_SCALE, Bitmap, Drawing, Item, Text, to_image
from edge_rsvlm.types import Alert

RULES = """version = 1
budget = 1

[[rule]]
name = "anything large"
min_area = "150 m2"
min_score = 0.3
"""
AERIAL, RIVER = 7, 3
"""How many of the ten are of which."""
SIDE, GAP, TEXT_WIDE = 192, 12, 300
PAPER, INK, FAINT = "#fafbf8", "#16181d", "#5b6472"
MEMORY_BYTES = 2 << 30
Pair = tuple[Path, Path]


def aerial_pairs(data: Path) -> Iterator[Pair]:
    """First and last date of each site."""
    sites: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((data / "naip_trees" / "train").glob("*.tif")):
        sites[re.sub(r"_20\d\d_", "_", path.name)].append(path)
    for dates in sites.values():
        yield dates[0], dates[-1]


def river_pairs(data: Path) -> Iterator[Pair]:
    return itertools.pairwise(sorted((data / "series" / "landsat_ucayali").glob("*.tif")))


def strongest(session: Session, pairs: Iterator[Pair], folder: Path, count: int) -> list[Alert]:
    """The best alert of each pair, and of these the best."""
    rules_file = folder / "rules.toml"
    rules_file.write_text(RULES)
    found = []
    for before, after in pairs:
        earlier, later = (Source(path.name, str(path)) for path in (before, after))
        told = compare(
            session, earlier, later, lambda *_: None, rules=load_rules(rules_file), tracks=None,
            when=scene_time(later), crops=folder,
        )  # fmt: skip
        found += told.alerts
    return sorted(found, key=lambda alert: -alert.score)[:count]


def sheet(alerts: list[Alert]) -> Drawing:
    """Two columns of alerts: before, after, and what is told."""
    items: list[Item] = []
    wide = 2 * SIDE + 3 * GAP + TEXT_WIDE
    for n, alert in enumerate(alerts):
        x, y = n % 2 * wide + GAP, n // 2 * (SIDE + GAP) + GAP
        for k, crop in enumerate(alert.crops):
            picture = np.asarray(Image.open(crop).convert("RGB"))
            height, width = (SIDE * side / max(picture.shape[:2]) for side in picture.shape[:2])
            items.append(Bitmap((x + k * (SIDE + GAP), y, width, height), picture))
        items += _told(alert, x + 2 * (SIDE + GAP), y + 16)
    rows = (len(alerts) + 1) // 2
    return Drawing(2 * wide, rows * (SIDE + GAP) + GAP, PAPER, tuple(items))


def _told(alert: Alert, x: float, y: float) -> Iterator[Item]:
    names = f"{alert.record['before']} to {alert.record['after']}"
    yield Text((x, y), names, 11, FAINT)
    yield Text((x, y + 18), f"score {alert.score:.2f}", 11, FAINT)
    for k, line in enumerate(textwrap.wrap(alert.sentence, 44)):
        yield Text((x, y + 44 + 18 * k), line, 13, INK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/alerts.webp"))
    options = parser.parse_args()
    session = Session(load_bundle(packaged_folder()), Limits(MEMORY_BYTES))
    with tempfile.TemporaryDirectory() as folder:
        alerts = strongest(session, aerial_pairs(options.data), Path(folder), AERIAL)
        alerts += strongest(session, river_pairs(options.data), Path(folder), RIVER)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        to_image(sheet(alerts)).reduce(PNG_SCALE).save(options.out, "WEBP", quality=80)
    for alert in alerts:
        print(f"{alert.score:.2f} {alert.record['before']} -> {alert.record['after']}: {alert.sentence}")


if __name__ == "__main__":
    main()
