"""From an image and a sentence to answers: transformers with its own processors, against the runtime and a bundle."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.offered import detect_task, search_task
from edge_rsvlm.config.task_specs import AnswerTask, GenerateTask, OpenDetectTask
from edge_rsvlm.export.families.base import Arrays, Family, Source
from edge_rsvlm.export.proof.gates import Check, Gate, agreement_check, tensor_checks
from edge_rsvlm.export.proof.probe import TEXT, prepared
from edge_rsvlm.pipeline.runtime import Runtime, cpu_engine
from edge_rsvlm.tasks.search import Sampling

UNBOUNDED = 0
WHOLE = "whole"


def end_to_end(
    family: Family, source: Source, model: nn.Module, bundle: Bundle, image_HWC: NDArray[np.uint8], gate: Gate,
    adapter: str | None = None,
) -> list[Check]:  # fmt: skip
    """One check per answer that both sides give."""
    expected = family.reference(source, model, image_HWC, TEXT)
    runtime = Runtime(bundle, cpu_engine(1, UNBOUNDED))
    runtime.switch(adapter)
    if "tokens" in expected:
        return _generated(runtime, image_HWC, expected, gate)
    if "boxes" in expected:
        return _detected(runtime, image_HWC, expected, gate)
    if "image_embedding" in expected:
        return _matched(runtime, image_HWC, expected, gate)
    return _answered(runtime, image_HWC, expected, gate)


def _generated(runtime: Runtime, image_HWC: NDArray[np.uint8], expected: Arrays, gate: Gate) -> list[Check]:
    tasks = runtime.manifest.tasks
    task = tasks.ask or tasks.caption
    assert isinstance(task, GenerateTask)
    generator = runtime.generator("ask", task.model_copy(update={"beams": 1}))
    image, tokens_T = prepared(task.input, image_HWC), expected["tokens"]
    if gate.agreement == 1:
        (found_T,) = generator.tokens([image], TEXT, Sampling(temperature=0.0, max_tokens=len(tokens_T)))
    else:
        found_T = _likeliest(generator.follow(image, TEXT, tokens_T), tokens_T, gate.error)
    return [agreement_check(WHOLE, found_T.tolist(), tokens_T.tolist(), gate)]


def _likeliest(logits_TV: NDArray[np.float32], tokens_T: NDArray[np.int64], error: float) -> NDArray[np.int64]:
    """The likeliest tokens after those of a given answer, which stand where they come within ``error`` of it.

    Where precision is lost two tokens that lie that close may change places, and all that follows is then another
    sentence, no worse.
    """
    best_T = logits_TV.max(axis=1)
    close_T = best_T - logits_TV[np.arange(len(tokens_T)), tokens_T] <= error * np.abs(logits_TV).max(axis=1)
    return np.where(close_T, tokens_T, logits_TV.argmax(axis=1))


def _detected(runtime: Runtime, image_HWC: NDArray[np.uint8], expected: Arrays, gate: Gate) -> list[Check]:
    """Every box that the model proposes, by falling score."""
    task = detect_task(runtime.manifest)
    assert isinstance(task, OpenDetectTask)
    proposals = len(expected["scores"])
    bare = task.model_copy(update={"query_prompt": "{label}", "max_boxes_per_tile": proposals})
    (boxes,) = runtime.open_detector(bare, [TEXT], -1.0)(prepared(task.input, image_HWC).pixels_KCHW)
    order = np.argsort(-expected["scores"], kind="stable")
    centre, half = expected["boxes"][order, :2], expected["boxes"][order, 2:] / 2
    return [
        *tensor_checks(f"{WHOLE}.scores", boxes.scores_N, expected["scores"][order], gate),
        *tensor_checks(f"{WHOLE}.boxes", boxes.xyxy_N4, np.hstack([centre - half, centre + half]), gate),
    ]


def _matched(runtime: Runtime, image_HWC: NDArray[np.uint8], expected: Arrays, gate: Gate) -> list[Check]:
    task = search_task(runtime.manifest)
    matcher = runtime.matcher("search", task)
    image_D = matcher.images(prepared(task.input, image_HWC).pixels_KCHW)[0]
    text_D = matcher.texts([TEXT])[0]
    score = np.array([image_D @ text_D * task.logit_scale + task.logit_bias])
    found = {"image_embedding": image_D, "text_embedding": text_D, "score": score}
    return [check for name in found for check in tensor_checks(f"{WHOLE}.{name}", found[name], expected[name], gate)]


def _answered(runtime: Runtime, image_HWC: NDArray[np.uint8], expected: Arrays, gate: Gate) -> list[Check]:
    task = runtime.manifest.tasks.ask
    assert isinstance(task, AnswerTask)
    images: Any = expected["features"][None] if task.input is None else prepared(task.input, image_HWC).pixels_KCHW
    (logits_K,) = runtime.answerer(task).logits(images, TEXT)
    return tensor_checks(f"{WHOLE}.logits", logits_K, expected["logits"], gate)
