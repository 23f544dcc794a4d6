"""The in-memory feature cache gives what the target gives, runs a document once, and keeps to its room."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama

from fastdraft.batch import Batch
from fastdraft.features.memory import FeatureCache
from fastdraft.target.hf import Target


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_llama().double())


def pack(*documents: list[int]) -> Batch:
    ids = torch.tensor([token for document in documents for token in document])
    return Batch(ids, torch.ones(len(ids), dtype=torch.bool), tuple(len(document) for document in documents))


def count_runs(target: Target, monkeypatch) -> list[tuple[int, ...]]:
    runs, capture = [], target.capture
    monkeypatch.setattr(target, "capture", lambda batch: runs.append(batch.lengths) or capture(batch))
    return runs


A, B, C = list(range(3, 20)), list(range(40, 49)), list(range(90, 115))


def test_features_are_the_targets_and_a_document_is_run_once(target, monkeypatch):
    cache, runs = FeatureCache(target, 1.0), count_runs(target, monkeypatch)
    for documents in ((A, B), (C, A, B), (B, C)):
        batch = pack(*documents)
        ours, theirs = cache.capture(batch), Target.capture(target, batch)
        torch.testing.assert_close(ours.g, theirs.g, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.f, theirs.f, rtol=1e-12, atol=1e-12)
    assert runs == [(17, 9), (25,)]


def test_what_does_not_fit_is_run_again(target, monkeypatch):
    bytes_of_b = 9 * 4 * 32 * 8
    cache, runs = FeatureCache(target, bytes_of_b / 2**30), count_runs(target, monkeypatch)
    for _ in range(2):
        cache.capture(pack(A, B))
    assert runs == [(17, 9), (17,)]


def test_kept_features_do_not_alias_what_was_given(target):
    cache = FeatureCache(target, 1.0)
    cache.capture(pack(A)).g.zero_()
    assert cache.capture(pack(A)).g.abs().max() > 0
