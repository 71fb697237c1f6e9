"""A UNet that is watched, and an engine around it."""

from collections.abc import Iterator

import pytest

from engine.engine import Engine
from engine_workload import (
    TABLES,
    WatchedUNet,
    make_engine,
)


@pytest.fixture
def unet() -> WatchedUNet:
    return WatchedUNet()


@pytest.fixture
def engine(unet: WatchedUNet) -> Iterator[Engine]:
    engine = make_engine(unet, TABLES)
    yield engine
    if unet.gate is not None:
        unet.gate.release(100_000)
    engine.close()
