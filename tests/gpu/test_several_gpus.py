"""A server whose kv_decode processes take turns on all GPUs of the host (on the one where there is but one)."""

import pytest
import torch

from support.gpu_site import open_site

pytestmark = [pytest.mark.gpu, pytest.mark.triton, pytest.mark.slow]


def test_every_gpu_has_decoders_and_hits_give_the_computed_answers(tmp_path_factory):
    gpus = tuple(range(torch.cuda.device_count()))
    processes = 2 * len(gpus)
    with open_site(tmp_path_factory.mktemp, decode_gpus=gpus, decode_instances=processes) as site:
        site.expect_hit()
        site.ask_all()
        log = site.running.server.log_path.read_text()
        used = {gpu: log.count(f"units are decoded by NVDEC of GPU {gpu}") for gpu in gpus}
        assert used == dict.fromkeys(gpus, 2)
        assert "are restored by the CPU" not in log
