"""Checks that the models' configurations share; each raises a ValueError that names the field."""

from __future__ import annotations

from ipr_fast.schedule import Schedule


def positive_int(name: str, value: object) -> int:
    """An int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return value


def schedule_pair(name: str, value: object) -> tuple[int, float]:
    """The two numbers of a Schedule, as a tuple; JSON brings a list."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be (steps_per_patch, overlap), got {value!r}")
    Schedule(*value)
    return tuple(value)
