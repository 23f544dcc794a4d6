"""Sources of the features that a module's `server` gives."""

from __future__ import annotations

import pytest
import torch

from fastdraft.run.draft import draft_shape
from fastdraft.run.inputs import open_source


@pytest.fixture
def served(make_config, server):
    """A config whose target the server runs, with dotted changes."""
    return lambda **changes: make_config(**{"target.url": server.url, "target.timeout_s": 5} | changes)


@pytest.fixture
def opened(served):
    """A source of a config with dotted changes; closed after the test."""
    sources = []

    def make(**changes):
        config = served(**changes)
        sources.append(open_source(config, draft_shape(config).layers, torch.device("cpu"), []))
        return sources[-1]

    yield make
    for source in sources:
        source.close()
