"""Peak memory of the export of large models with random weights: a Qwen2-VL of 2.2 billion parameters (bf16, 4.4 GB on
disk), and a LLaVA of 7 billion (f16, 14 GB in shards).

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
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")

from edge_rsvlm.export.checkpoint.skeleton import skeleton  # noqa: E402
from tests import tiny_generators  # noqa: E402

TEXT = {
    "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}  # fmt: skip
VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14}
LLAMA = {
    "model_type": "llama", "vocab_size": 32_064, "hidden_size": 4096, "intermediate_size": 11_008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
BLOCK, SHARD_BYTES = 1 << 22, 5_000_000_000


def allowed(largest_tensor: int) -> float:
    """Bytes, for a model whose largest tensor has so many numbers."""
    return 1.5 * largest_tensor * 4 + 2e9


def qwen2_vl(folder: Path) -> Path:
    """2.2 billion parameters; tokenizer and processor of a tiny one."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tiny_generators.qwen(folder)
    small = json.loads((folder / "config.json").read_text())
    config = Qwen2VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True)
    saved = config.to_dict() | {key: value for key, value in small.items() if key.endswith("_token_id")}
    saved |= {"architectures": ["Qwen2VLForConditionalGeneration"], "dtype": "bfloat16"}
    saved["text_config"] |= {key: value for key, value in small["text_config"].items() if key.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(saved))
    images = json.loads((folder / "preprocessor_config.json").read_text()) | {"patch_size": VISION["patch_size"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return write_weights(folder, skeleton(Qwen2VLForConditionalGeneration, config), "BF16", torch.bfloat16)


def llava(folder: Path) -> Path:
    """7 billion parameters in shards, as LLaVA 1.5 has them; tokenizer and processor of a tiny one."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tiny_generators.llava(folder)
    small = json.loads((folder / "config.json").read_text())
    token = small.get("image_token_id", small.get("image_token_index"))
    config = LlavaConfig(text_config=LLAMA, vision_config=CLIP, image_token_index=token)
    saved = config.to_dict() | {"architectures": ["LlavaForConditionalGeneration"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(saved))
    processor = json.loads((folder / "processor_config.json").read_text())
    side = CLIP["image_size"]
    processor["image_processor"] |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return write_weights(folder, skeleton(LlavaForConditionalGeneration, config), "F16", torch.float16)


def write_weights(folder: Path, model: torch.nn.Module, name: str, dtype: torch.dtype) -> Path:
    """Random ones of two bytes, block by block, norms around 1; in shards and their index, as transformers does."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards: list[list[tuple[str, torch.Tensor]]] = [[]]
    for item in model.named_parameters():
        if sum(parameter.numel() for _, parameter in [*shards[-1], item]) * 2 > SHARD_BYTES:
            shards.append([])
        shards[-1].append(item)
    noise = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    placed = {}
    for number, shard in enumerate(shards, start=1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        placed |= dict.fromkeys((parameter for parameter, _ in shard), file.name)
        _write_shard(file, shard, noise, name, dtype)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_shard(
    file: Path, shard: list[tuple[str, torch.Tensor]], noise: torch.Tensor, name: str, dtype: torch.dtype
) -> None:
    header, end = {}, 0
    for key, parameter in shard:
        size = parameter.numel() * 2
        header[key] = {"dtype": name, "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for index, (key, parameter) in enumerate(shard):
            scale = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            for start in range(0, parameter.numel(), BLOCK):
                count = min(BLOCK, parameter.numel() - start)
                values = noise[(index * 7919) % BLOCK :][:count] + scale
                out.write(values.to(dtype).view(torch.uint8).numpy().data)


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


def exported(tmp_path: Path, write: Callable[[Path], Path], target: str, allowed: float) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write(checkpoint)
    executable = str(Path(sys.executable).parent / "edge-rsvlm")
    begun = time.monotonic()
    command = [executable, "export", "run", "--checkpoint", str(checkpoint), "--target", target]
    peak = resident_peak([*command, "--out", str(tmp_path / "bundle")])
    seconds = time.monotonic() - begun
    shutil.rmtree(tmp_path / "bundle")
    shutil.rmtree(checkpoint)
    print(f"\n{target}: peak {peak / 1e9:.2f} GB of {allowed / 1e9:.2f} GB allowed, {seconds:.0f} s")
    assert peak <= allowed


@pytest.mark.parametrize("target", ["onnx:f16", "onnx:f32"])
def test_two_billion_parameters(tmp_path, target):
    exported(tmp_path, qwen2_vl, target, allowed(151_936 * 1536))


@pytest.mark.skipif("EDGE_RSVLM_SLOW" not in os.environ, reason="EDGE_RSVLM_SLOW=1 writes 30 GB in ten minutes")
def test_seven_billion_parameters(tmp_path):
    exported(tmp_path, llava, "onnx:f16", allowed(32_064 * 4096))
