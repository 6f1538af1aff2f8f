"""Export: a model as `WritableFormat.write` takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twingpt.core.checkpoint.quantize import Quantization
from twingpt.core.config import GPTConfig
from twingpt.core.tokenizer import Tokenizer

Array = np.ndarray


@dataclass(frozen=True)
class Export:
    """A model to be written, a tensor at a time; `source` is the folder or file that it comes from.

    `tensors` are float32 parameters in the order of the parameter table, which a format stores in `dtype`, or one
    that can by `quantization`; with `quantized` they are so already, as `stored_shapes` has them. `ids` are
    bos_token_id and eos_token_id, `texts` further files, by name.
    """

    source: Path
    config: GPTConfig
    tensors: Iterable[tuple[str, Array]]
    tokenizer: Tokenizer | None
    quantization: Quantization | None
    quantized: bool
    dtype: str
    ids: Mapping[str, Any]
    texts: Mapping[str, str]
