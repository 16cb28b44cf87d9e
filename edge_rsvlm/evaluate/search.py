"""Retrieval between images and their captions: recall at 1, 5 and 10, both ways, and the mean of the six.

A caption that another image has too counts as a miss there, as it does in the papers (Yuan et al. 2022, "AMFMN", and
Liu et al. 2024, "RemoteCLIP"). Letters: I images, T captions of all of them, D dimensions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_rsvlm import scoring
from edge_rsvlm.errors import InputError
from edge_rsvlm.evaluate import Evaluation, counted
from edge_rsvlm.evaluate.labels import chosen, locate, read_captions
from edge_rsvlm.pipeline.outcome import Progress
from edge_rsvlm.pipeline.session import Session


def evaluate_search(
    session: Session, captions: Path, images: str, only: Path | None, progress: Progress | None
) -> Evaluation:
    """Recall in percent, against JSON lines of ``{"image", "captions"}``; an image is the mean of its tiles."""
    session.require("search")
    references = read_captions(captions)
    names = chosen(list(references), only, captions)
    said = [text for name in names for text in references[name]]
    sources = counted(locate(images, names), progress)
    seen_ID = np.stack([_image(session, source.path) for source in sources])
    # People misspell: a caption with a word that the bundle would refuse is searched for, and may miss.
    known = {text: session.embed_text(text, any_words=True) for text in dict.fromkeys(said)}
    cosine_IT = seen_ID @ np.stack([known[text] for text in said]).T
    owner_T = np.repeat(np.arange(len(names)), [len(references[name]) for name in names])
    return Evaluation("search", len(names), tuple(scoring.recall_scores(cosine_IT, owner_T)))


def _image(session: Session, path: str) -> NDArray[np.float64]:
    mean_D = session.embed(path, lambda *_: None).mean_D
    if mean_D is None:
        raise InputError(f"{path}: has no valid pixel", fix="remove it from the captions")
    return mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)
