import pytest

from support.fetch_world import World


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.units.decoder.close()
    made.arena.close()
