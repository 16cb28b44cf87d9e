"""Models that write text, as teacher or student.

Letters: A answer tokens, V vocabulary, T visual tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.distilling.data import Item
from edge_rsvlm.export.distilling.losses import feature_distance, feature_map, token_divergence
from edge_rsvlm.export.distilling.recipe import Losses
from edge_rsvlm.export.finetuning.answers import answer_ids, answer_logits, place
from edge_rsvlm.export.finetuning.loop import Process
from edge_rsvlm.export.finetuning.samples import Encoded, Encoder, Sample

TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")
