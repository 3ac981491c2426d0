"""Fixture: a small SRM UNet."""

import pytest
from published_files import TINY, made

from ipr_fast.models import SRMUNet


@pytest.fixture(scope="module")
def unet() -> SRMUNet:
    return made(TINY, 0)
