"""`kvfetcher doctor` on a GPU: every engine decodes the golden streams, times go into the table."""

import json

import pytest

from kvfetcher.cli import main
from kvfetcher.codec.gpu.nvdec import count_engines
from kvfetcher.config import cache_home
from kvfetcher.doctor import timing
from kvfetcher.fetch.planning.decode_times import H100_NVDEC, load_table

pytestmark = pytest.mark.gpu


def test_doctor_proves_every_engine_and_keeps_the_times(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(timing.PICTURE_SIZES, "nvdec", ((256, 640), (1024, 640)))
    main(["doctor", "--json"])
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["driver"]["status"] == "ok"
    assert checks["NVDEC"]["status"] == "ok"
    assert checks["nvdec golden"]["status"] == "ok", checks["nvdec golden"]["detail"]
    assert f"{count_engines(0)} processes at once" in checks["nvdec golden"]["detail"]
    assert checks["encoder"]["status"] == "ok"
    table = load_table(cache_home(), fallback=H100_NVDEC)
    assert (table.decoder, table.num_decoders) == ("nvdec", count_engines(0))
    assert 1e-4 < table.points[0].latency_seconds < 0.1
