import json

import pytest
from chats import make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Write rows (objects, text or bytes) as a JSONL file and return its path."""

    def write(rows, name="data.jsonl"):
        lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write
