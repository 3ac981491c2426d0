"""Samples of finished pieces of a measurement, kept in a folder: a stopped measurement goes on from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipr_fast import checks, outputs

RUN_FILE = "run.json"


class KeptTokens:
    """Tokens (B, N) by the names of pieces of work: in memory, and as .npy files where there is a folder.

    run: what the samples depend on, ready for JSON. Raises ValueError for a folder of another run, naming what differs,
    and for one that cannot be written.
    """

    def __init__(self, folder: Path | None, run: dict[str, Any]) -> None:
        self.folder, self._held = folder, dict[str, Tensor]()
        if folder is None:
            return
        outputs.prepare_folder(folder)
        run = json.loads(json.dumps(run))  # tuples become lists
        file = folder / RUN_FILE
        if file.exists():
            checks.same_settings(file, outputs.read_json(file, "the record of a run"), run)
        outputs.write_json(file, run)

    def has(self, name: str) -> bool:
        return name in self._held or (self.folder is not None and self._file(name).exists())

    def get(self, name: str, shape: tuple[int, int], vocabulary: int, make: Callable[[], Tensor]) -> Tensor:
        """Return the tokens of a piece, from the folder or from `make`, which is then kept.

        Raises ValueError for a file that does not hold ids below `vocabulary` of that shape.
        """
        if name not in self._held:
            self._held[name] = self._read(name, shape, vocabulary) if self.has(name) else self._write(name, make())
        return self._held[name]

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / (re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".npy")

    def _read(self, name: str, shape: tuple[int, int], vocabulary: int) -> Tensor:
        file = self._file(name)
        try:
            tokens = np.load(file)
            if tokens.dtype != np.int32 or tokens.shape != shape or (tokens < 0).any() or (tokens >= vocabulary).any():
                raise ValueError(f"it must hold int32 ids below {vocabulary} of shape {shape}")
            return torch.from_numpy(tokens).long()
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file}: cannot be read as samples ({error}); remove it to make them again") from error

    def _write(self, name: str, tokens: Tensor) -> Tensor:
        tokens = tokens.cpu()
        if self.folder is not None:
            with outputs.replacing(self._file(name)) as file:
                np.save(file, tokens.to(torch.int32).numpy())
        return tokens
