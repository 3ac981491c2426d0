"""Read the checkpoint of a training run."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import torch

from ipr_fast.errors import load_reason


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """Return the state that `Trainer.save` wrote, weights included; raise ValueError for any other file."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # the loader does not look at the checksums
            if damaged is not None:
                raise ValueError(f"{damaged} is damaged")
        state = dict(torch.load(path, map_location=device, weights_only=True))
        state["step"], state["seconds"] = int(state["step"]), float(state["seconds"])
        state["settings"], state["config"] = dict(state["settings"]), dict(json.loads(state["config"]))
        if state["step"] < 0 or not 0 <= state["seconds"] < math.inf:
            raise ValueError(f"step {state['step']}, {state['seconds']} seconds")
        return state
    except Exception as error:  # a foreign file makes the loader raise almost anything
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}: {load_reason(error)})") from error
