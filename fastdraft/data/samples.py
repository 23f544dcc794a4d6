"""A sample is one document to train on; a data set of samples is a `datasets.Dataset` over Arrow, one row each.

# n samples, M tokens of them end to end
Columns: input_ids list<int32>, loss_mask list<bool>, conversation uint64 (content hash of where the sample came from).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset

SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_())), ("conversation", pa.uint64())]
)


@dataclass(frozen=True)
class Sample:
    input_ids: np.ndarray  # [L] int32
    loss_mask: np.ndarray  # [L] bool, True where the draft is trained to predict this token
    conversation: int = 0  # content hash of the conversation, 64 bits

    @property
    def trains(self) -> bool:
        """Whether any loss can come of it: tokens 0 and 1 of a document are never predicted (x_{t+2+i} is)."""
        return bool(self.loss_mask[2:].any())


def record_batch(samples: list[Sample]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *(len(s.input_ids) for s in samples)]).astype(np.int32)
    ids = np.concatenate([np.zeros(0, np.int32), *(s.input_ids for s in samples)])
    mask = np.concatenate([np.zeros(0, bool), *(s.loss_mask for s in samples)])
    keys = np.array([s.conversation for s in samples], dtype=np.uint64)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(x)) for x in (ids.astype(np.int32), mask.astype(bool))]
    return pa.RecordBatch.from_arrays([*lists, pa.array(keys)], schema=SCHEMA)


def flat(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a data set end to end: token ids [M], loss mask [M] bool, lengths [n].

    ValueError if a row's two columns differ in length.
    """
    columns = []
    for name in ("input_ids", "loss_mask"):
        column = table[name].combine_chunks()
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        columns.append((column.flatten().to_numpy(zero_copy_only=False), lengths))
    (ids, lengths), (mask, mask_lengths) = columns
    if not np.array_equal(lengths, mask_lengths):
        row = int(np.flatnonzero(lengths != mask_lengths)[0])
        raise ValueError(f"a sample has {lengths[row]} input_ids but {mask_lengths[row]} loss_mask entries")
    return ids, mask.astype(bool, copy=False), lengths.astype(np.int64)


def longest_sample(dataset: Dataset) -> int:
    """Tokens of the longest sample, 0 where there is none."""
    return max((int(lengths.max(initial=0)) for _, _, lengths in scan(dataset)), default=0)


def scan(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The whole data set in order as `flat` pieces of a thousand samples."""
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        yield flat(table)
