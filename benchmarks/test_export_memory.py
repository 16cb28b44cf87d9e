"""Peak memory of the export of a Qwen2-VL with 2.2 billion random parameters (bf16, 4.4 GB on disk).

The floor is the largest tensor in float32: at most 1.5 times that and 2 GB may be resident, mapped files included.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")

from tests import tiny_generators  # noqa: E402

TEXT = {
    "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}  # fmt: skip
VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14}
BLOCK = 1 << 22
ALLOWED = 1.5 * 151_936 * 1536 * 4 + 2e9


def random_checkpoint(folder: Path) -> Path:
    """Weights written block by block, tokenizer and processor of a tiny one."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from edge_rsvlm.export.checkpoint.skeleton import skeleton

    tiny_generators.qwen(folder)
    small = json.loads((folder / "config.json").read_text())
    config = Qwen2VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True)
    model = skeleton(Qwen2VLForConditionalGeneration, config)
    saved = config.to_dict() | {key: value for key, value in small.items() if key.endswith("_token_id")}
    saved |= {"architectures": ["Qwen2VLForConditionalGeneration"], "dtype": "bfloat16"}
    saved["text_config"] |= {key: value for key, value in small["text_config"].items() if key.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(saved))
    images = json.loads((folder / "preprocessor_config.json").read_text()) | {"patch_size": VISION["patch_size"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    noise = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            scale = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            for start in range(0, parameter.numel(), BLOCK):
                count = min(BLOCK, parameter.numel() - start)
                values = noise[(index * 7919) % BLOCK :][:count] + scale
                file.write(values.to(torch.bfloat16).view(torch.uint8).numpy().data)
    return folder


def resident_peak(command: list[str]) -> int:
    """Greatest resident bytes of a command, or of one of its children."""
    process = subprocess.Popen(command)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max([peak, *map(_resident, _family(process.pid))])
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    watcher.join()
    assert process.returncode == 0
    return peak


def _family(pid: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - a kernel folder
        children = [c for t in tasks for c in Path(f"/proc/{pid}/task/{t}/children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in _family(int(child)))]


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0)


@pytest.mark.parametrize("target", ["onnx:f16", "onnx:f32"])
def test_two_billion_parameters(tmp_path, target):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    random_checkpoint(checkpoint)
    executable = str(Path(sys.executable).parent / "edge-rsvlm")
    begun = time.monotonic()
    command = [executable, "export", "run", "--checkpoint", str(checkpoint), "--target", target]
    peak = resident_peak([*command, "--out", str(tmp_path / "bundle")])
    shutil.rmtree(tmp_path / "bundle")
    shutil.rmtree(checkpoint)
    seconds = time.monotonic() - begun
    print(f"\n{target}: peak {peak / 1e9:.2f} GB of {ALLOWED / 1e9:.2f} GB allowed, {seconds:.0f} s")
    assert peak <= ALLOWED
