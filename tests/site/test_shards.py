"""The example that pools the statistics of shards on Ray."""

import pytest
from support.backend import only
from support.scripts import run


@only("tensorflow", "workers take the default backend")
def test_a_shard_is_done_again_where_a_worker_is_killed():
    pytest.importorskip("ray", reason="the example runs on Ray")
    result = run("shards.py")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "a worker was killed: True" in result.stdout
    assert "6 shards, 576 samples" in result.stdout
