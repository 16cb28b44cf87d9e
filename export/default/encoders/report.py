"""The tables of ``docs/encoders.md``, between marks; what stands around them is left as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin: written by export/default/encoders/compare.py -->", "<!-- end -->"
Rows = list[tuple[str, list[str]]]


def write_report(path: Path, results: Sequence[dict[str, Any]], latency: dict[str, Any]) -> None:
    """Put the tables into ``path``. ValueError when it has no marks."""
    text = path.read_text() if path.is_file() else f"# Encoders\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no place for the tables: add the lines '{BEGIN}' and '{END}'")
    path.write_text(f"{before}{BEGIN}\n\n{tables(results, latency)}\n{END}{after}")


def tables(results: Sequence[dict[str, Any]], latency: dict[str, Any]) -> str:
    """Accuracy per candidate, then cost per architecture."""
    names = [r["name"] for r in results]
    per_graph = {r["graph"]: r for r in reversed(results)}
    ordered = list(dict.fromkeys(r["graph"] for r in results))
    costs = _cost_rows([per_graph[g] for g in ordered]) + _latency_rows([latency[g] for g in ordered])
    return f"{_table('accuracy', names, _accuracy_rows(results))}\n{_table('cost', ordered, costs)}"


def _accuracy_rows(results: Sequence[dict[str, Any]]) -> Rows:
    def percent(*path: str) -> list[str]:
        return [f"{100 * _at(r, *path):.1f} %" for r in results]

    def number(*path: str, digits: int = 3) -> list[str]:
        return [f"{_at(r, *path):.{digits}f}" for r in results]

    def loss(name: str) -> list[str]:
        return [f"{100 * (r['int8'][name] - r['f32'][name]):+.1f}" for r in results]

    return [
        ("frozen ImageNet features: ridge probe, UCM top-1", percent("probe", "top1")),
        ("fine-tuning: minutes of one core", number("minutes", digits=0)),
        ("fine-tuning: steps of 12 tiles", number("training", "steps", digits=0)),
        ("UCM scene top-1", percent("f32", "scene_top1")),
        ("UCM scene log loss", number("f32", "scene_log_loss")),
        ("UCM multi-label mAP", percent("f32", "labels_map")),
        ("centre heat loss", number("f32", "heat_loss")),
        ("centre AP, airplane", percent("f32", "ap_airplane")),
        ("centre AP, vehicle", percent("f32", "ap_vehicle")),
        ("ridge probe of the fine-tuned features, UCM top-1", percent("f32", "probe_top1")),
        ("INT8: cosine of c5", number("cosine", "c5", digits=4)),
        ("INT8: lowest cosine of a map", [f"{min(r['cosine'].values()):.4f}" for r in results]),
        ("INT8: change of probe top-1, points", loss("probe_top1")),
        ("INT8: change of scene top-1, points", loss("scene_top1")),
        ("INT8: change of label mAP, points", loss("labels_map")),
        ("INT8: change of centre AP (airplane), points", loss("ap_airplane")),
        ("INT8: change of centre AP (vehicle), points", loss("ap_vehicle")),
    ]


def _cost_rows(results: Sequence[dict[str, Any]]) -> Rows:
    return [
        ("parameters, million", [f"{r['parameters'] / 1e6:.2f}" for r in results]),
        ("multiply-accumulates at 384 px, million", [f"{r['macs'] / 1e6:.0f}" for r in results]),
        ("bytes of the f32 graph, million", [f"{r['bytes']['f32'] / 1e6:.2f}" for r in results]),
        ("bytes of the INT8 graph, million", [f"{r['bytes']['int8'] / 1e6:.2f}" for r in results]),
    ]


def _latency_rows(timed: Sequence[dict[str, Any]]) -> Rows:
    return [
        (
            f"{title}, {threads} thread{'s' if threads > 1 else ''}: ms (median), beside MobileNetV2 f32",
            [f"{t[f'{kind}_{threads}']['p50_ms']:.1f} ({t[f'{kind}_{threads}']['ratio']:.2f}x)" for t in timed],
        )
        for kind, title in (("f32", "f32"), ("int8", "INT8 U8S8"))
        for threads in (1, 2)
    ]


def _table(first: str, heads: Sequence[str], rows: Rows) -> str:
    lines = [[first, *heads], ["---", *("---:" for _ in heads)], *([title, *cells] for title, cells in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _at(record: dict[str, Any], *path: str) -> float:
    for name in path:
        record = record[name]
    return float(record)  # type: ignore[arg-type]
