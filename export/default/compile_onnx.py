"""Torch modules -> the ONNX graphs of a bundle, with weights stored in half precision.

Graphs (opset 20, which TensorRT 10 reads), all with a dynamic batch N:
    encoder         tiles [N, 5, H, W]                    -> c1 .. c5
    detect          c2 .. c5                              -> scores [N, K, H/4, W/4], ltrb [N, 4, H/4, W/4] in tile px
    change          before_c1 .. c4, after_c1 .. c4       -> change [N, 1, H/2, W/2], a probability
    caption_prefix  c5                                    -> features [N, T, D]
    caption_embed   input_ids [N, T]                      -> inputs_embeds [N, T, D]
    caption_decoder inputs_embeds, past_key_values.*      -> logits [N, 1, V] of the last token, present.*
Weights are float16 initialisers behind Cast nodes: the engine folds them at load and computes in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edge_rsvlm.export.artifact import Artifact, part
from edge_rsvlm.export.default.model import change, detect
from edge_rsvlm.export.default.model.decoder import Cache, Captioner, DecoderConfig
from edge_rsvlm.export.default.model.encoder import CHANNELS, STEM_BANDS, STRIDES, Encoder
from edge_rsvlm.export.default.model.layers import fold_batch_norms

OPSET = 20
HALF_FROM = 64  # smaller initialisers stay as they are
EXAMPLE_PX = 128
DYNAMIC = torch.export.Dim.DYNAMIC
ENCODER_MAPS = tuple(CHANNELS)
DETECT_MAPS = ("c2", "c3", "c4", "c5")
CHANGE_MAPS = ("c1", "c2", "c3", "c4")
CHANGE_INPUTS = tuple(f"{date}_{name}" for date in ("before", "after") for name in CHANGE_MAPS)


@dataclass(frozen=True)
class Model:
    """Everything a bundle runs, in eval mode with batch norms folded."""

    encoder: Encoder
    detect: detect.DetectHead
    change: change.ChangeHead
    captioner: Captioner


def load_model(joint: Artifact, compared: Artifact, caption: Artifact) -> Model:
    """The trained model: encoder and boxes of the joint stage, the change head of its own, the captioner."""
    trained, words = joint.tensors(), caption.tensors()
    vocabulary = len(words["decoder.embed_tokens.weight"])
    model = Model(
        Encoder(), detect.DetectHead(), change.ChangeHead(), Captioner(DecoderConfig(vocabulary, dropout=0.0))
    )
    model.encoder.load_state_dict(part(trained, "encoder"))
    model.detect.load_state_dict(part(trained, "detect"))
    model.change.load_state_dict(compared.tensors())
    model.captioner.load_state_dict(words)
    for module in (model.encoder, model.detect, model.change, model.captioner):
        module.eval()
        fold_batch_norms(module)
    return model


class EncoderGraph(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tiles: Tensor) -> tuple[Tensor, ...]:
        maps = self.encoder(tiles)
        return tuple(maps[name] for name in ENCODER_MAPS)


class DetectGraph(nn.Module):
    def __init__(self, head: detect.DetectHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor]:
        return detect.outputs(*self.head(dict(zip(DETECT_MAPS, (c2, c3, c4, c5), strict=True))))


class ChangeGraph(nn.Module):
    def __init__(self, head: change.ChangeHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, b1: Tensor, b2: Tensor, b3: Tensor, b4: Tensor, a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor
    ) -> Tensor:
        before = dict(zip(CHANGE_MAPS, (b1, b2, b3, b4), strict=True))
        after = dict(zip(CHANGE_MAPS, (a1, a2, a3, a4), strict=True))
        return torch.sigmoid(self.head(before, after))


class PrefixGraph(nn.Module):
    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.prefix = captioner.prefix

    def forward(self, c5: Tensor) -> Tensor:
        out: Tensor = self.prefix(c5)
        return out


class EmbedGraph(nn.Module):
    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.embed_tokens = captioner.decoder.embed_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.embed_tokens(tokens)
        return out


class DecoderGraph(nn.Module):
    """One graph for prefill (empty past) and for each further token."""

    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.decoder = captioner.decoder

    def forward(self, embeds: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """``past`` and what follows the logits: the key and the value of each layer, [N, A, T, K]."""
        read, length = past[0].shape[2], embeds.shape[1]
        positions = torch.arange(length, device=embeds.device) + read
        mask = torch.arange(read + length, device=embeds.device)[None, :] <= positions[:, None]
        cache = Cache(torch.stack(past[0::2]), torch.stack(past[1::2]))
        hidden, grown = self.decoder(embeds, positions[None].expand(embeds.shape[0], -1), mask, cache)
        layers = zip(grown.keys.unbind(), grown.values.unbind(), strict=True)
        return self.decoder.logits(hidden[:, -1:]), *(part for pair in layers for part in pair)


def compile_all(model: Model, folder: Path) -> dict[str, Path]:
    """Write every graph to ``folder``; returns file paths by graph name."""
    maps = {
        name: torch.randn(2, channels, EXAMPLE_PX // STRIDES[name], EXAMPLE_PX // STRIDES[name])
        for name, channels in CHANNELS.items()
    }
    nchw = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
    config = model.captioner.decoder.config
    cache = [f"{{}}.{i}.{part}" for i in range(config.layers) for part in ("key", "value")]
    past = [torch.randn(2, config.heads, 5, config.head_width) for _ in cache]
    tokens = {0: DYNAMIC, 1: DYNAMIC}
    # Tensors of their own: the exporter takes one tensor given twice for one input.
    pair = [torch.randn_like(maps[name]) for _ in ("before", "after") for name in CHANGE_MAPS]
    recipes: list[tuple[str, nn.Module, tuple[Tensor, ...], list[str], list[str], list[Any]]] = [
        ("encoder", EncoderGraph(model.encoder), (torch.randn(2, len(STEM_BANDS), EXAMPLE_PX, EXAMPLE_PX),),
         ["tiles"], list(ENCODER_MAPS), [nchw]),
        ("detect", DetectGraph(model.detect), tuple(maps[n] for n in DETECT_MAPS),
         list(DETECT_MAPS), ["scores", "ltrb"], [nchw] * 4),
        ("change", ChangeGraph(model.change), tuple(pair), list(CHANGE_INPUTS), ["change"], [nchw] * 8),
        ("caption_prefix", PrefixGraph(model.captioner), (maps["c5"],), ["c5"], ["features"], [nchw]),
        ("caption_embed", EmbedGraph(model.captioner), (torch.zeros(2, 3, dtype=torch.long),),
         ["input_ids"], ["inputs_embeds"], [tokens]),
        ("caption_decoder", DecoderGraph(model.captioner), (torch.randn(2, 3, config.width), *past),
         ["inputs_embeds", *(c.format("past_key_values") for c in cache)],
         ["logits", *(c.format("present") for c in cache)], [tokens, tuple({0: DYNAMIC, 2: DYNAMIC} for _ in past)]),
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, module, example, inputs, outputs, dynamic in recipes:
        paths[name] = folder / f"{name}.onnx"
        _export(module.eval(), example, inputs, outputs, dynamic, paths[name])
    return paths


def graph_names(path: Path) -> tuple[list[str], list[str]]:
    """Names of a graph's inputs and outputs, in order."""
    graph = onnx.load(path, load_external_data=False).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


def _export(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic: list[Any],
    path: Path,
) -> None:
    program = torch.onnx.export(
        module, example, dynamo=True, opset_version=OPSET, verbose=False, input_names=inputs, output_names=outputs,
        dynamic_shapes=tuple(dynamic), external_data=False,
    )  # fmt: skip
    assert program is not None
    graph = store_in_half(program.model_proto)
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString())


def store_in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Float32 initialisers as float16 ones behind a Cast; tensors whose values float16 cannot hold are refused."""
    graph, casts = model.graph, []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < HALF_FROM:
            continue
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise ValueError(f"{tensor.name} does not fit float16")
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_f16"))
        casts.append(helper.make_node("Cast", [f"{name}_f16"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    _strip_notes(model)
    return model


def _strip_notes(model: onnx.ModelProto) -> None:
    """Drop source locations of the machine that exported."""
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
