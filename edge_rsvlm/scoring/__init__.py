"""Scores of every task, each with a bootstrap 95 % interval over images: pure numbers, no files."""

from edge_rsvlm.scoring.captions import bleu4, caption_scores, words
from edge_rsvlm.scoring.detection import ClassMatches, Found, Truth, ap50, detection_scores, match_detections
from edge_rsvlm.scoring.libraries import caption_libraries, detection_libraries
from edge_rsvlm.scoring.retrieval import recall_scores
from edge_rsvlm.scoring.sampling import Score, loss_bound, score_of_draws
from edge_rsvlm.scoring.shares import UNKNOWN, accuracy_score, balanced_scores, change_counts, rate_scores, rates

__all__ = [
    "UNKNOWN", "ClassMatches", "Found", "Score", "Truth", "accuracy_score", "ap50", "balanced_scores", "bleu4",
    "caption_libraries", "caption_scores", "change_counts", "detection_libraries", "detection_scores", "loss_bound",
    "match_detections", "rate_scores", "rates", "recall_scores", "score_of_draws", "words",
]  # fmt: skip
