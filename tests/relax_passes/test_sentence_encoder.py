"""A real encoder with its real weights gives the same embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo

from relax_passes.frontend import from_torch
from tvm_flashinfer.bench import sentence_encoder

pytestmark = pytest.mark.skipif(
    sentence_encoder.find() is None, reason=f"not installed: {sentence_encoder.INSTALL}"
)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("whole", [False, True], ids=["decomposed", "whole"])
def test_same_embeddings(whole: bool) -> None:
    directory = sentence_encoder.find()
    assert directory is not None
    model = sentence_encoder.SentenceEncoder(directory)
    args = sentence_encoder.encode_inputs(directory, 32)
    with torch.no_grad():
        want = model(*args).numpy()
    mod = from_torch(model, args) if whole else zoo.import_module(model, args)
    new, report = zoo.inject(mod)
    assert [(s.reason, s.variant, s.mask) for s in report.sites] == [("", "softmax", "padding")] * 6
    assert cosine(zoo.run(new, args), want).min() >= 0.99999
