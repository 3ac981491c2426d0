"""Records of a shard: a row for each chain, arm and recorded iteration, as one Parquet file.

| column | |
| --- | --- |
| `seed`, `chain`, `arm`, `iteration` | which sample |
| `good`, `measure_NAME` | the judge's verdict |
| `model_calls`, `evaluations`, `reward_calls` | cost of the sample up to this iteration |
| `seconds` | time of the shard's arm up to this iteration, divided by its chains; a shared start is the first arm's |
| `sample` | the sample's float32 or int64 numbers, of the chains that are kept; else null |
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from ipr_fast.errors import import_extra
from ipr_fast.outputs import WRITING, replacing

PYARROW = ("pyarrow", "evaluation", "records of samples")
MEASURE = "measure_"
AGAIN = "the command that made this run, `ipr-fast evaluate`, makes it again"


class Rows:
    """Rows of one shard, collected in memory, a block (B rows) at a time."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []

    def add(
        self,
        seed: int,
        chains: Tensor,
        arm: str,
        iteration: int,
        verdict: Mapping[str, Tensor],
        costs: Mapping[str, Tensor],
        seconds: float,
        samples: Tensor,
    ) -> None:
        """Add a block for chains (B,). verdict: good and the measures; samples (K, ...): of the first K chains."""
        count = len(chains)
        stored = [each.tobytes() for each in samples.detach().cpu().numpy()]
        self._blocks.append(
            {
                "seed": np.full(count, seed, np.int64),
                "chain": chains.numpy(),
                "arm": [arm] * count,
                "iteration": np.full(count, iteration, np.int32),
                **{name: values.cpu().numpy() for name, values in verdict.items()},
                **{name: values.cpu().numpy() for name, values in costs.items()},
                "seconds": np.full(count, seconds / max(1, count), np.float32),
                "sample": [*stored, *[None] * (count - len(stored))],
            }
        )

    def table(self) -> Any:
        """Return all blocks as a pyarrow table."""
        pa = load_pyarrow()
        tables = []
        for block in self._blocks:
            arm = pa.array(block["arm"], pa.string()).dictionary_encode()
            sample = pa.array(block["sample"], pa.binary())
            tables.append(pa.table({**block, "arm": arm, "sample": sample}))
        return pa.concat_tables(tables).unify_dictionaries()


def write_shard(path: Path, table: Any, facts: Mapping[str, str]) -> None:
    """Write a shard's table with facts about it, as a file that is whole or not there. Raises OSError.

    The file is written beside under a name of this process's own, synced, and renamed.
    """
    parquet = load_parquet()
    metadata = {**(table.schema.metadata or {}), **{key: value.encode() for key, value in facts.items()}}
    with replacing(path, suffix=f".{socket.gethostname()}-{os.getpid()}{WRITING}") as file:
        parquet.write_table(table.replace_schema_metadata(metadata), file, compression="zstd", write_page_checksum=True)


def read_shard(path: Path, identity: str, num_rows: int, wanted: Callable[[str], bool] | None = None) -> Any:
    """Read a shard's table, checksums verified. Raises ValueError if the file is damaged or of another run.

    An error of the machine, which says nothing of the file's content, stays an OSError or a MemoryError.
    wanted: whether a column of that name is read; the others are neither read nor verified. None: all.
    """
    pa, parquet = load_pyarrow(), load_parquet()
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            found = (file.schema_arrow.metadata or {}).get(b"identity", b"").decode()
            names = file.schema_arrow.names
            table = file.read(columns=None if wanted is None else [name for name in names if wanted(name)])
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{path}: a damaged shard ({type(error).__name__}); {AGAIN}") from error
    if found != identity:
        raise ValueError(f"{path}: another shard ({found}), expected {identity}; {AGAIN}")
    if table.num_rows != num_rows:
        raise ValueError(f"{path}: {table.num_rows} rows in place of {num_rows}; {AGAIN}")
    return table


def load_pyarrow() -> ModuleType:
    """Import pyarrow; raise MissingExtra or BrokenExtra where that fails."""
    return import_extra("pyarrow", *PYARROW)


def load_parquet() -> ModuleType:
    """Import pyarrow.parquet."""
    return import_extra("pyarrow.parquet", *PYARROW)
