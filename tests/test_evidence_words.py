"""What is said of a change: sentences, what indices mean, and labels that they contradict."""

from __future__ import annotations

import numpy as np
import pytest

from edge_rsvlm.config.cover import APPEARED, BURNT, GAINED, GONE, LOST, UNKNOWN
from edge_rsvlm.pipeline.evidence import contradicted
from edge_rsvlm.pipeline.sentences import sentence
from edge_rsvlm.pipeline.spectral import meaning, normalized_difference


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"from": "trees", "to": "bare soil"}, "About 1,240 m2 of trees became bare soil."),
        ({"from": "trees", "to": "trees"}, "About 1,240 m2 of trees changed and is trees still."),
        ({"from": "trees"}, "About 1,240 m2 of trees changed."),
        ({"to": "sealed ground"}, "About 1,240 m2 changed and looks like sealed ground now."),
        ({}, "About 1,240 m2 changed."),
        ({"area_m2": 18.234}, "About 18.2 m2 changed."),
        ({"area_m2": 99_999}, "About 100,000 m2 changed."),
        ({"area_m2": 123_456}, "About 12.3 ha changed."),
        ({"area_m2": 12_345_678}, "About 12.3 km2 changed."),
        ({"area_m2": None}, "About 120 pixels changed."),
        ({"area_m2": None, "area_px": 1}, "About 1 pixel changed."),
        ({"spectral": {"meaning": None}}, "About 1,240 m2 changed."),
        (
            {"spectral": {"meaning": GAINED, "ndvi": {"difference": 0.314}}},
            "About 1,240 m2 changed; the vegetation index rose by 0.31.",
        ),
        (
            {"spectral": {"meaning": GONE, "ndwi": {"difference": -0.4}}},
            "About 1,240 m2 changed; the water index fell by 0.40, as where water goes.",
        ),
        (
            {"spectral": {"meaning": BURNT, "nbr": {"difference": -0.5}}},
            "About 1,240 m2 changed; the burn ratio fell by 0.50, as after a fire.",
        ),
    ],
)
def test_sentences(changed, said):
    record = {"area_m2": 1243.2, "area_px": 120, "from": UNKNOWN, "to": UNKNOWN}
    assert sentence(record | changed) == said


def test_indices_are_normalized_differences():
    a, b = np.float32([3, 0, 5, -2, 0]), np.float32([1, 4, 5, 2, 0])
    np.testing.assert_allclose(normalized_difference(a, b), [0.5, -1, 0, -1, 0])


DARK, BRIGHT = (-1.0, -1.0), (2.0, 2.0)


@pytest.mark.parametrize(
    ("indices", "deviations", "said"),
    [
        ({"ndvi": (0.5, 0.2)}, {}, LOST),
        ({"ndvi": (0.2, 0.5)}, {}, GAINED),
        ({"ndvi": (0.5, 0.4)}, {}, None),
        ({"ndvi": (0.15, -0.1)}, {}, None),  # it was not green
        ({"ndvi": (0.5, 0.2)}, {"red": BRIGHT}, None),  # nothing green is so bright
        ({"ndvi": (0.0, 0.4)}, {"red": DARK, "blue": BRIGHT}, None),  # a roof of blue steel
        ({"ndvi": (0.5, 0.2)}, {"red": (-1.0, 3.0)}, LOST),  # bright ground came
        ({"ndwi": (-0.2, 0.3), "ndvi": (0.5, -0.2)}, {"nir": (1.0, -1.0)}, APPEARED),
        ({"ndwi": (-0.2, 0.3), "ndvi": (0.0, 0.0)}, {"nir": (1.0, 1.0)}, None),  # a bright roof
        ({"ndwi": (0.1, 0.5), "ndvi": (0.0, 0.0)}, {}, None),  # it was above 0 before: no water came
        ({"ndwi": (0.3, -0.2), "ndvi": (-0.2, 0.5)}, {"nir": (-1.0, 1.0)}, GONE),
        ({"ndvi": (0.6, 0.1), "nbr": (0.5, 0.1)}, {}, BURNT),
        ({"ndvi": (0.6, 0.1), "nbr": (0.5, 0.3)}, {}, LOST),
        ({}, {}, None),
    ],
)
def test_what_the_spectrum_says(indices, deviations, said):
    assert meaning(indices, deviations) == said


@pytest.mark.parametrize(
    ("before", "after", "said", "wrong"),
    [
        ("bare soil", "trees", LOST, True),
        ("trees", "bare soil", LOST, False),
        ("trees", "trees", LOST, False),
        ("trees", "sealed ground", GAINED, True),
        ("unknown", "trees", LOST, False),
        ("water", "sand", APPEARED, True),
        ("trees", "bare soil", None, False),
    ],
)
def test_labels_that_the_spectrum_contradicts(before, after, said, wrong):
    assert contradicted(before, after, said) == wrong
