"""Whether DALI may decode a window of an image without the rest of it on this device.

On some GPUs region decoding fails or ends the process (nvImageCodec#55: an error on A100 and GB200, a segmentation
fault on H100 and B200). So a process of its own tries it once: windows of JPEG files of several kinds, against the same
windows of whole images. Only the same bits will do; then the choice changes no pixel.
"""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from functools import cache

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_SIDE, _TIMEOUT_S = 32, 120
_KINDS = ({}, {"subsampling": 0}, {"progressive": True}, {"quality": 30})


@cache
def may_decode_regions(device_id: int | None) -> bool:
    """Return whether region decoding works on a GPU (None: on the CPU) as decoding whole images does.

    Logs which way was chosen. Takes some seconds, once per process and device.
    """
    where = "the CPU" if device_id is None else f"GPU {device_id}"
    command = [sys.executable, "-m", "dataloading.dali_self_test", "cpu" if device_id is None else str(device_id)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        failure = f"exit status {done.returncode}: {done.stderr.strip()[-200:]}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        logger.warning("DALI decodes whole images on %s: region decoding failed its self-test (%s)", where, failure)
    else:
        logger.info("DALI decodes windows without the rest of the image on %s: self-test passed", where)
    return not failure


def made_up_files() -> tuple[list[NDArray[np.uint8]], NDArray[np.int64], NDArray[np.int64]]:
    """Return JPEG files with windows in them: top and left, height and width."""
    from PIL import Image

    generator = np.random.default_rng(0)
    files, anchors, sizes = [], [], []
    for number in range(24):
        height, width = (int(side) for side in generator.integers(17, 400, 2))
        small = generator.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        (image.convert("L") if number % 5 == 4 else image).save(file, "JPEG", **_KINDS[number % len(_KINDS)])
        top, left = int(generator.integers(0, height)), int(generator.integers(0, width))
        files.append(np.frombuffer(file.getvalue(), np.uint8))
        anchors.append((top, left))
        sizes.append((int(generator.integers(1, height - top + 1)), int(generator.integers(1, width - left + 1))))
    return files, np.array(anchors), np.array(sizes)


def main() -> None:
    """Compare both ways on a device; exit with 1 where they differ."""
    import torch

    from dataloading.dali_pipeline import build_pipeline

    device = torch.device("cpu" if sys.argv[1] == "cpu" else f"cuda:{sys.argv[1]}")
    files, anchors_M2, sizes_M2 = made_up_files()
    crops = []
    for regions in (True, False):
        pipeline = build_pipeline(_SIDE, len(files), device, 2, regions=regions)
        pipeline.feed_input("encoded", files)
        pipeline.feed_input("anchors", anchors_M2.astype(np.int32))
        pipeline.feed_input("sizes", sizes_M2.astype(np.int32))
        (found,) = pipeline.run()
        crops.append(torch.from_dlpack(found.as_tensor()).cpu())
    if not torch.equal(*crops):
        differing = (crops[0] != crops[1]).flatten(1).any(dim=1).sum().item()
        sys.exit(f"{differing} of {len(files)} windows have other pixels")


if __name__ == "__main__":
    main()
