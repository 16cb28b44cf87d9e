"""Steps of a whole image: against the image processors of transformers, and against geometry worked out by hand."""

from __future__ import annotations

import importlib

import numpy as np
import PIL
import pytest
from PIL import Image
from pydantic import TypeAdapter

from edge_rsvlm.config.prepare import (
    CenterCrop,
    PadSquare,
    Resize,
    ResizeLongest,
    ResizeShortest,
    ResizeToTiles,
    SmartResize,
    Split,
    Step,
)
from edge_rsvlm.errors import UsageError
from edge_rsvlm.tiles.prepare import prepare, resized

CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = 0.5, 0.5
SIZES_WH = [(37, 211), (640, 480), (1000, 333), (30, 30), (61, 5), (1, 1)]


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[: height // 2] = np.where(image[: height // 2] > 127, 255, 0)  # overshoot of negative lobes is clipped
    return image


def processor(module, name, **options):
    found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, f"{name}ImageProcessorPil")(**options)


def pixels(output):
    return output["pixel_values"]


def first_image(output):
    return output["pixel_values"][0]


def unpatched(output):
    """Pixels of Qwen2-VL's patches: 14 px, 2 x 2 merged, each twice for two frames."""
    _, rows, cols = output["image_grid_thw"][0]
    patches = output["pixel_values"].reshape(rows // 2, cols // 2, 2, 2, 3, 2, 14, 14)
    np.testing.assert_array_equal(patches[..., 0, :, :], patches[..., 1, :, :])
    return patches[..., 0, :, :].transpose(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, rows * 14, cols * 14)


def square(px):
    return {"height": px, "width": px}


LLAVA_FILL = tuple(float(int(mean * 255)) for mean in CLIP[0])
IDEFICS = {"size": {"longest_edge": 120}, "max_image_size": {"longest_edge": 30}}
CASES = {
    "clip": (
        ("clip", "CLIP", {"size": {"shortest_edge": 40}, "crop_size": square(40)}, pixels),
        [ResizeShortest(px=40, filter="bicubic"), CenterCrop(size=(40, 40))],
        CLIP,
    ),
    "clip that pads": (
        ("clip", "CLIP", {"size": {"shortest_edge": 32}, "crop_size": {"height": 45, "width": 33}}, pixels),
        [ResizeShortest(px=32, filter="bicubic"), CenterCrop(size=(45, 33))],
        CLIP,
    ),
    "siglip": (("siglip", "Siglip", {"size": square(48)}, pixels), [Resize(size=(48, 48), filter="bicubic")], HALF),
    "llava, padded": (
        ("llava", "Llava", {"do_pad": True, "size": {"shortest_edge": 42}, "crop_size": square(42)}, pixels),
        [
            PadSquare(fill=LLAVA_FILL, place="centre"),
            ResizeShortest(px=42, filter="bicubic"),
            CenterCrop(size=(42, 42)),
        ],
        CLIP,
    ),
    "vilt": (
        ("vilt", "Vilt", {"size": {"shortest_edge": 384}}, pixels),
        [ResizeShortest(px=384, longest_px=639, multiple=32, filter="bicubic")],
        HALF,
    ),
    "owlvit": (("owlvit", "OwlViT", {"size": square(96)}, pixels), [Resize(size=(96, 96), filter="bicubic")], CLIP),
    "owlv2": (
        ("owlv2", "Owlv2", {"size": square(96)}, pixels),
        [PadSquare(fill=(0, 0, 0), place="top_left"), Resize(size=(96, 96), filter="gaussian")],
        CLIP,
    ),
    "idefics3, split": (
        ("idefics3", "Idefics3", IDEFICS, first_image),
        [
            ResizeLongest(px=120, even=True, filter="lanczos3"),
            ResizeToTiles(px=30, filter="lanczos3"),
            Split(px=30, filter="lanczos3"),
        ],
        HALF,
    ),
    "smolvlm, whole": (
        ("smolvlm", "SmolVLM", {**IDEFICS, "do_image_splitting": False}, first_image),
        [ResizeLongest(px=120, even=True, filter="lanczos3"), Resize(size=(30, 30), filter="lanczos3")],
        HALF,
    ),
    "qwen2_vl": (
        ("qwen2_vl", "Qwen2VL", {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 60}}, unpatched),
        [SmartResize(multiple=28, min_pixels=56 * 56, max_pixels=28 * 28 * 60, filter="bicubic")],
        CLIP,
    ),
    "blip-2": (("blip", "Blip", {"size": square(50)}, pixels), [Resize(size=(50, 50), filter="bicubic")], CLIP),
    "align": (
        (
            "efficientnet",
            "EfficientNet",
            {
                "size": square(46),
                "do_center_crop": True,
                "crop_size": square(39),
                "rescale_factor": 1 / 127.5,
                "rescale_offset": True,
                "do_normalize": False,
                "include_top": False,
                "resample": Image.Resampling.BILINEAR,
            },
            pixels,
        ),
        [Resize(size=(46, 46), filter="bilinear"), CenterCrop(size=(39, 39))],
        HALF,
    ),
    "efficientnet of the first years": (
        ("efficientnet", "EfficientNet", {"size": square(46), "resample": Image.Resampling.NEAREST}, pixels),
        [Resize(size=(46, 46), filter="nearest")],
        (0.5, 0.25),
    ),
    "vit": (("vit", "ViT", {"size": square(40)}, pixels), [Resize(size=(40, 40), filter="bilinear")], HALF),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_transformers(case, needs):
    needs("transformers")
    if int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("needs Pillow 13: earlier ones resize tall images in another order")
    (module, name, options, take), steps, (mean, std) = CASES[case]
    if case == "owlv2":
        needs("scipy")
    theirs = processor(module, name, **options)
    for size in SIZES_WH:
        image = noise(*size)
        expected = take(theirs(images=Image.fromarray(image), return_tensors="np"))
        actual = prepare(image, steps, mean, std).pixels_KCHW
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=5e-6, err_msg=f"{size}")


def test_no_step_is_only_normalised():
    image = noise(5, 4)
    done = prepare(image, (), (0.1, 0.2, 0.3), (1, 2, 4))
    expected = (image / 255 - np.array([0.1, 0.2, 0.3])) / np.array([1, 2, 4])
    np.testing.assert_allclose(done.pixels_KCHW[0], expected.transpose(2, 0, 1), atol=1e-6)
    assert (done.rows, done.cols, done.to_image) == (1, 1, (1, 1, 0, 0))


@pytest.mark.parametrize(
    "step, size_wh, expected_wh",
    [
        (ResizeShortest(px=224, filter="bicubic"), (37, 211), (224, 1277)),
        (ResizeShortest(px=224, filter="bicubic"), (211, 37), (1277, 224)),
        (ResizeShortest(px=384, longest_px=639, multiple=32, filter="bicubic"), (640, 480), (512, 384)),
        (ResizeShortest(px=384, longest_px=639, multiple=32, filter="bicubic"), (1000, 333), (608, 192)),
        (ResizeShortest(px=384, longest_px=639, multiple=32, filter="bicubic"), (2, 900), (32, 608)),
        (ResizeLongest(px=100, filter="bicubic"), (30, 200), (15, 100)),
        (ResizeLongest(px=100, even=True, filter="bicubic"), (30, 200), (16, 100)),
        (ResizeLongest(px=100, even=True, filter="bicubic"), (900, 1), (100, 1)),
        (ResizeToTiles(px=30, filter="bicubic"), (31, 90), (60, 90)),
        (ResizeToTiles(px=30, filter="bicubic"), (100, 1), (120, 30)),
        (SmartResize(multiple=28, min_pixels=3136, max_pixels=10**6, filter="bicubic"), (10, 10), (56, 56)),
        (SmartResize(multiple=28, min_pixels=3136, max_pixels=28 * 28 * 4, filter="bicubic"), (400, 100), (112, 28)),
    ],
)
def test_sizes(step, size_wh, expected_wh):
    assert resized(step, size_wh[::-1]) == expected_wh[::-1]
    assert TypeAdapter(Step).validate_json(step.model_dump_json()) == step


def test_points_find_their_way_back():
    """A gradient says where a pixel came from."""
    width, height = 200, 120
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = np.stack([x, y, np.full_like(x, 9)], axis=-1).astype(np.uint8)
    steps = [
        PadSquare(fill=(0, 0, 0), place="centre"),
        Resize(size=(100, 50), filter="bilinear"),
        CenterCrop(size=(30, 21)),
        ResizeLongest(px=60, filter="bilinear"),
    ]
    done = prepare(image, steps, 0.0, 1 / 255)
    scale_x, scale_y, offset_x, offset_y = done.to_image
    _, _, rows, cols = done.pixels_KCHW.shape
    for row, col in [(20, 10), (rows - 20, cols - 10), (rows // 2, cols // 2)]:
        found = done.pixels_KCHW[0, :2, row, col] + 0.5
        expected = (col + 0.5) * scale_x + offset_x, (row + 0.5) * scale_y + offset_y
        np.testing.assert_allclose(found, expected, atol=1.1)


def test_split_is_raster_order_then_overview():
    image = noise(6, 4)
    done = prepare(image, [Split(px=2, filter="bicubic")], 0.0, 1 / 255, threads=3)
    assert (done.rows, done.cols, done.to_image) == (2, 3, (1, 1, 0, 0))
    assert done.pixels_KCHW.shape == (7, 3, 2, 2)
    for k in range(6):
        row, col = divmod(k, 3)
        tile = image[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].transpose(2, 0, 1)
        np.testing.assert_allclose(done.pixels_KCHW[k], tile, atol=1e-4)
    overview = prepare(image, [Resize(size=(2, 2), filter="bicubic")], 0.0, 1 / 255)
    np.testing.assert_array_equal(done.pixels_KCHW[6:], overview.pixels_KCHW)
    alone = prepare(image[:2, :2], [Split(px=2, filter="bicubic")], 0.0, 1 / 255)
    assert (alone.rows, alone.cols, len(alone.pixels_KCHW)) == (1, 1, 1)


def test_what_surrounds_an_image():
    image = np.full((2, 6, 3), 200, np.uint8)
    padded = prepare(image, [PadSquare(fill=(10, 20, 30), place="centre")], 0.0, 1 / 255).pixels_KCHW[0]
    np.testing.assert_allclose(
        padded[:, [0, 2, 3, 5], 0].T, [[10, 20, 30], [200] * 3, [200] * 3, [10, 20, 30]], atol=1e-4
    )
    cropped = prepare(image, [CenterCrop(size=(3, 4))], 0.0, 1 / 255)
    np.testing.assert_allclose(cropped.pixels_KCHW[0, 0, :, 0], [0, 200, 200], atol=1e-4)
    assert cropped.to_image == (1, 1, 1, -1)


def test_a_view_of_an_image_is_taken():
    image = noise(40, 30)
    steps = [Resize(size=(8, 8), filter="lanczos3")]
    flipped = prepare(image[::-1, ::2], steps, 0.5, 0.5).pixels_KCHW
    np.testing.assert_array_equal(flipped, prepare(image[::-1, ::2].copy(), steps, 0.5, 0.5).pixels_KCHW)


@pytest.mark.parametrize(
    "image, steps",
    [
        (np.zeros((4, 4, 3), np.float32), []),
        (np.zeros((4, 4), np.uint8), []),
        (np.zeros((4, 4, 4), np.uint8), []),
        (np.zeros((0, 4, 3), np.uint8), []),
        (noise(5, 4), [Split(px=2, filter="bicubic")]),
        (noise(4, 4), [Split(px=2, filter="bicubic"), CenterCrop(size=(2, 2))]),
        (noise(1, 201), [SmartResize(multiple=28, min_pixels=3136, max_pixels=10**6, filter="bicubic")]),
    ],
)
def test_what_has_no_answer_says_so(image, steps):
    with pytest.raises(UsageError):
        prepare(image, steps, 0.5, 0.5)
