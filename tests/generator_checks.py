"""Tiny models that write text, as an export sees them: asked by the manifest's words alone, and by transformers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("onnxscript", reason="needs onnxscript: not installed")
pytest.importorskip("sentencepiece", reason="needs sentencepiece: not installed")

from PIL import Image  # noqa: E402

from edge_rsvlm.config.task_specs import GenerateTask  # noqa: E402
from edge_rsvlm.export.families.base import Source  # noqa: E402
from edge_rsvlm.export.families.blip_2 import Blip2  # noqa: E402
from edge_rsvlm.export.families.idefics3 import Idefics3  # noqa: E402
from edge_rsvlm.export.families.image_processors import load_image_processor  # noqa: E402
from edge_rsvlm.export.families.llava import Llava  # noqa: E402
from edge_rsvlm.export.families.qwen2_vl import Qwen2VL  # noqa: E402
from edge_rsvlm.export.families.tokenizers import load_tokenizer, tokenizer_json  # noqa: E402
from edge_rsvlm.tasks.decoder import Decoder  # noqa: E402
from edge_rsvlm.tasks.prompt import Layout, grid, mrope_positions, sequence_positions, write_image  # noqa: E402
from tests import tiny_generators as tiny  # noqa: E402

QUESTION = "how many airplanes are there?"
SIZES_HW = ((90, 130), (200, 56), (33, 310))
FAMILIES = {"llava": Llava(), "idefics3": Idefics3(), "smolvlm": Idefics3(), "blip-2": Blip2()}
FAMILIES |= {"qwen2_vl": Qwen2VL(), "qwen2_5_vl": Qwen2VL()}
MAKERS = {
    "llava": tiny.llava,
    "idefics3": tiny.idefics3,
    "smolvlm": lambda folder: tiny.idefics3(folder, smol=True),
    "qwen2_vl": tiny.qwen,
    "qwen2_5_vl": lambda folder: tiny.qwen(folder, version="qwen2_5_vl"),
    "blip-2": tiny.blip_2,
}


@dataclass
class Made:
    """A checkpoint, its family, and transformers' own model of it."""

    source: Source
    model: torch.nn.Module

    @property
    def family(self):
        return FAMILIES[self.source.config.model_type]


@dataclass
class Prepared:
    pixels_KCHW: np.ndarray
    rows: int = 1
    cols: int = 1


class TorchSession:
    """A graph before it is traced."""

    def __init__(self, plan, model):
        self.plan, self.module = plan, plan.wrap(model).eval()

    def run(self, inputs, outputs):
        given = [torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in self.plan.inputs]
        with torch.no_grad():
            found = self.module(*given)
        found = dict(zip(self.plan.outputs, found if isinstance(found, tuple) else (found,), strict=True))
        return [found[name].numpy() for name in outputs]


class OnnxSession:
    def __init__(self, plan, model, file):
        ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime: not installed")
        module = plan.wrap(model).eval()
        free = torch.export.Dim.DYNAMIC
        shapes = [{k: free for k, size in enumerate(spec.shape) if isinstance(size, str)} for spec in plan.inputs]
        named = sum(p.kind is not p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
        shapes = (*shapes[:named], *([tuple(shapes[named:])] if shapes[named:] else []))
        torch.onnx.export(
            module, tuple(map(self.example, plan.inputs, [plan.sizes] * len(plan.inputs))), file,
            input_names=[spec.name for spec in plan.inputs], output_names=list(plan.outputs), dynamic_shapes=shapes,
            dynamo=True, opset_version=20, external_data=False, verbose=False,
        )  # fmt: skip
        self.session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    @staticmethod
    def example(spec, sizes):
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        return torch.zeros(shape, dtype=spec.dtype)

    def run(self, inputs, outputs):
        return self.session.run(list(outputs), dict(inputs))


def load(folder: Path) -> Made:
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = FAMILIES[config.model_type].model_class(config)
    return Made(Source(folder, config), model_class.from_pretrained(folder).eval())


def torch_sessions(made: Made) -> dict:
    return {plan.name: TorchSession(plan, made.model) for plan in made.family.graphs(made.source)}


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blobs, so that what a resize keeps differs from image to image."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def prepared(made: Made, image_HWC: np.ndarray) -> Prepared:
    """The image as transformers prepares it, in the layout of our graphs."""
    options = {"return_row_col_info": True} if isinstance(made.family, Idefics3) else {}
    found = load_image_processor(made.source.folder)(Image.fromarray(image_HWC), return_tensors="np", **options)
    pixels = np.asarray(found["pixel_values"], np.float32)
    if "rows" in found:
        return Prepared(pixels[0], max(int(found["rows"][0][0]), 1), max(int(found["cols"][0][0]), 1))
    if "image_grid_thw" in found:
        _, rows, cols = found["image_grid_thw"][0]
        patches = pixels.reshape(rows // 2, cols // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
        pixels = patches.transpose(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, rows * 14, cols * 14)
    return Prepared(pixels)


def features_of(made: Made, image_HWC: np.ndarray) -> np.ndarray:
    """Visual tokens [T, D] as transformers computes them."""
    inputs = made.family.inputs(made.source, Image.fromarray(image_HWC), QUESTION)
    wanted = {
        name: inputs[name] for name in ("pixel_values", "image_grid_thw", "pixel_attention_mask") if name in inputs
    }
    with torch.no_grad():
        found = made.model.get_image_features(**wanted).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in found]).numpy()


def task_of(made: Made, verb: str = "ask") -> GenerateTask:
    fields = made.family.describe(made.source).tasks[verb]
    return GenerateTask.model_validate({**fields, "memory": {"session_bytes": 1, "tile_bytes": 1}})


def layout_of(image: Prepared) -> Layout:
    return Layout(len(image.pixels_KCHW), image.rows, image.cols, image.pixels_KCHW.shape[2:])


def prompt_ids(made: Made, task: GenerateTask, image: Prepared, text: str) -> np.ndarray:
    from tokenizers import Tokenizer

    written = task.prompt.replace("{image}", write_image(task.visual, layout_of(image))).replace("{text}", text)
    tokenizer = Tokenizer.from_str(tokenizer_json(load_tokenizer(made.source.folder)).decode())
    return np.array(tokenizer.encode(written, add_special_tokens=task.tokenizer.add_special_tokens).ids)


def answer(made: Made, sessions: dict, image_HWC: np.ndarray, text: str = QUESTION, chunk: int = 10**6):
    """Logits of the first token and 16 greedy tokens, read in chunks, by the manifest's fields only."""
    task, image = task_of(made), prepared(made, image_HWC)
    ids = prompt_ids(made, task, image, text)
    (features,) = sessions["image"].run({"tiles": image.pixels_KCHW}, ["features"])
    features = features.reshape(1, -1, features.shape[-1])
    if task.visual.token is None:
        ids = np.concatenate([np.full(features.shape[1], -1), ids])
        visual = ids == -1
    else:
        visual = ids == made.source.config.image_token_id
    (embeds,) = sessions["embed"].run({"input_ids": np.maximum(ids, 0)[None]}, ["inputs_embeds"])
    embeds[:, visual] = features
    if task.positions == "mrope":
        positions = mrope_positions(visual, grid(task.visual, layout_of(image).tile_hw))
    else:
        positions = sequence_positions(len(ids))
    decoder = Decoder(task.decoder.cache, sessions["decoder"], frozenset({"position_ids"}), 1)
    for start in range(0, len(ids), chunk):
        logits = decoder.read(embeds[:, start : start + chunk], positions[..., start : start + chunk])
    first, tokens = logits[0], [int(logits.argmax())]
    while len(tokens) < 16 and tokens[-1] not in task.eos_ids:
        (embeds,) = sessions["embed"].run({"input_ids": np.array([tokens[-1:]])}, ["inputs_embeds"])
        tokens.append(int(decoder.go_on(embeds, np.arange(1)).argmax()))
    return first, tokens


def assert_same(made: Made, sessions: dict, image_HWC: np.ndarray, **how) -> list[int]:
    expected = made.family.reference(made.source, made.model, image_HWC, QUESTION)
    logits, tokens = answer(made, sessions, image_HWC, **how)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert tokens == expected["tokens"].tolist()
    return tokens


@cache
def made_in(base: Path, name: str) -> Made:
    """A family's checkpoint by name, made once; write nothing to it."""
    folder = base / f"generator-{name}"
    folder.mkdir()
    return load(MAKERS[name](folder))
