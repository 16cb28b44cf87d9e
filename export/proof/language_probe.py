"""Golden probe of what llama.cpp does in a bundle: a packaged scene, a text, and the logits of an answer's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edge_rsvlm
from edge_rsvlm.bundle import Bundle
from edge_rsvlm.config.offered import by_llama
from edge_rsvlm.export.proof.accuracy import DEFAULT_TEXT, open_session
from edge_rsvlm.tasks.gguf import GgufGenerator, eight_bits
from edge_rsvlm.tasks.search import Sampling
from edge_rsvlm.verify import answer_logits

SCENE = Path(edge_rsvlm.__file__).parent / "scenes" / "marina.webp"
TOKENS = 8
TASK_PREFIX = "task."
"""Before the verb, in the name of a probe's file."""


def write_language_probe(bundle: Bundle, folder: Path) -> None:
    """Write ``task.VERB.npz`` for the first task whose words llama.cpp writes; its tasks share one model."""
    verb = next(verb for verb in ("caption", "ask", "ground") if by_llama(getattr(bundle.manifest.tasks, verb)))
    inputs = _inputs(bundle, verb)
    logits_AV = answer_logits(bundle, verb, inputs)
    arrays = {f"in.{name}": value for name, value in inputs.items()} | {"out.logits": logits_AV}
    np.savez_compressed(folder / f"{TASK_PREFIX}{verb}.npz", **arrays)  # type: ignore[arg-type]


def _inputs(bundle: Bundle, verb: str) -> dict[str, NDArray[Any]]:
    text = "" if verb == "caption" else DEFAULT_TEXT
    runtime, tiles = open_session(bundle).seen(verb, str(SCENE), 1)
    task = getattr(bundle.manifest.tasks, verb)
    generator = runtime.generator(verb, task)
    (answer_A,) = generator.tokens(tiles, text, Sampling(temperature=0.0, max_tokens=min(TOKENS, task.max_tokens)))
    if isinstance(generator, GgufGenerator):
        return {"image": eight_bits(tiles[0]), "text": np.array(text), "answer": answer_A}
    prompt = generator.read(tiles[0], text)
    return {
        "ids": prompt.ids_S, "visual": prompt.visual_S, "features": prompt.visual_NTD, "positions": prompt.positions,
        "answer": answer_A,
    }  # fmt: skip
