"""DALI's pipelines: used again by later evaluations, bound to torch's stream, and whose errors count as whose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_images import encoded_dataset, odd_sized_jpegs

from dataloading import dali_pipeline
from dataloading.dali_pipeline import DaliDecoder, is_of_the_device
from dataloading.encoded import Window
from dataloading.loader import eval_batches

CPU = torch.device("cpu")


def evaluated(dataset) -> torch.Tensor:
    batches = eval_batches(
        dataset, range(6), resize=40, crop=32, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=4, device="cpu",
        num_threads=1, backend="dali",
    )  # fmt: skip
    return torch.cat([batch.images_BCHW for batch in batches])


def test_evaluations_one_after_the_other_build_one_pipeline(monkeypatch):
    built, build = [], dali_pipeline.build_pipeline
    monkeypatch.setattr(dali_pipeline, "_IDLE", dali_pipeline._IdlePipelines(most=2))
    monkeypatch.setattr(dali_pipeline, "build_pipeline", lambda *a, **k: built.append(a) or build(*a, **k))
    dataset = encoded_dataset(odd_sized_jpegs(6))
    first = evaluated(dataset)
    for _ in range(2):
        assert torch.equal(evaluated(dataset), first)
    assert len(built) == 1


def test_decoders_at_the_same_time_have_pipelines_of_their_own_and_few_are_kept(monkeypatch):
    idle = dali_pipeline._IdlePipelines(most=2)
    monkeypatch.setattr(dali_pipeline, "_IDLE", idle)
    monkeypatch.setattr(dali_pipeline, "build_pipeline", lambda *a, **k: object())
    decoders = [DaliDecoder(size=32, max_windows=4, device=CPU, num_threads=1) for _ in range(3)]
    pipelines = {id(decoder._pipeline): decoder._pipeline for decoder in decoders}
    assert len(pipelines) == 3
    for decoder in decoders:
        decoder.close()
    assert len(idle._kept) == 2


class FailingPipeline:
    """Fails as DALI does, with a text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def feed_input(self, name, data): ...
    def schedule_run(self): ...

    def outputs(self, cuda_stream=None):
        raise RuntimeError(self.text)


OF_DECODING = "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.image_slice`,\n\n  {}{}"
OF_THE_DEVICE = [
    "encountered:\n\nCUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access was encountered",
    "encountered:\n\nCUDA driver API error CUDA_ERROR_ECC_UNCORRECTABLE (214)",
    "encountered:\n\nCan't allocate 1073741824 bytes on device 0. out of memory",
    "encountered:\n\nCUDA allocation failed",
    "encountered:\n\nstd::bad_alloc",
]
OF_AN_IMAGE = "encountered:\n\nnvImageCodec failure: '#3'\nCurrent pipeline object is no longer valid."


@pytest.mark.parametrize("cause", OF_THE_DEVICE)
def test_an_error_of_the_gpu_or_of_memory_ends_the_run_and_blames_no_image(monkeypatch, cause):
    idle = dali_pipeline._IdlePipelines(most=2)
    monkeypatch.setattr(dali_pipeline, "_IDLE", idle)
    monkeypatch.setattr(dali_pipeline, "build_pipeline", lambda *a, **k: FailingPipeline(OF_DECODING.format("", cause)))
    decoder = DaliDecoder(size=32, max_windows=4, device=CPU, num_threads=1)
    for _ in range(2):
        decoder.submit([Window(odd_sized_jpegs(1)[0], (0, 0), (4, 4), is_plain=True)])
    with pytest.raises(RuntimeError, match="encountered"):
        decoder.collect()
    decoder.close()
    assert not idle._kept, "a pipeline with a batch on its way is nobody's next one"


@pytest.mark.parametrize("place", ["", 'File "/opt/cuda/venv/dataloading/dali_pipeline.py", line 9\n\n'])
def test_an_error_of_an_image_is_no_error_of_the_device_wherever_dali_is_installed(place):
    assert not is_of_the_device(OF_DECODING.format(place, OF_AN_IMAGE))


class OnePixelOfMemory:
    def as_tensor(self):
        return np.zeros((1, 2, 2, 3), dtype=np.uint8)


class TakesStreams(FailingPipeline):
    def outputs(self, cuda_stream=None):
        self.stream = cuda_stream
        return (OnePixelOfMemory(),)


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 0)])
def test_crops_are_bound_to_torchs_stream_on_a_gpu(monkeypatch, device):
    """Else DALI is free to write the next batch where torch still reads."""
    pipeline, asked = TakesStreams(""), []
    monkeypatch.setattr(dali_pipeline, "_IDLE", dali_pipeline._IdlePipelines(most=2))
    monkeypatch.setattr(dali_pipeline, "build_pipeline", lambda *a, **k: pipeline)
    monkeypatch.setattr(dali_pipeline, "may_decode_regions", lambda _: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda on: asked.append(on) or "torch's stream")
    decoder = DaliDecoder(size=2, max_windows=1, device=device, num_threads=1)
    decoder.submit([Window(odd_sized_jpegs(1)[0], (0, 0), (4, 4), is_plain=True)])
    assert decoder.collect().crops.shape == (1, 3, 2, 2)
    assert pipeline.stream == ("torch's stream" if device.type == "cuda" else None)
    assert asked == ([device] if device.type == "cuda" else [])
