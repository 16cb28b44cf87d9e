"""Tiny random checkpoints of every family, in the layouts of transformers 4.x and 5.x, against ``from_pretrained``."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from edge_rsvlm.errors import InputError

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

from edge_rsvlm.export.checkpoint.reading import open_checkpoint  # noqa: E402
from tests.tiny_weights import CONFIGS, tiny  # noqa: E402

OLD_NAMES = {
    "llava": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector", "multi_modal_projector"),
    ),
    "qwen2_vl": ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    "qwen2_5_vl": ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    "idefics3": (),
    "smolvlm": (),
    "blip-2": (),
    "clip": (),
}
"""How transformers 4.x named what the 5.x classes name otherwise."""
STRAYS = {
    "llava": "vision_tower.vision_model.embeddings.position_ids",
    "idefics3": "model.vision_model.embeddings.position_ids",
    "smolvlm": "model.text_model.layers.0.self_attn.rotary_emb.inv_freq",
    "blip-2": "qformer.embeddings.position_ids",
    "clip": "text_model.embeddings.position_ids",
}


def expected(model_class, folder):
    """What transformers makes of the folder, in the dtype of the files."""
    return model_class.from_pretrained(folder, dtype="auto").state_dict()


def assert_equal(checkpoint, model_class, folder):
    wanted, got = expected(model_class, folder), checkpoint.weights(model_class)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        read = got[name].read()
        assert tuple(got[name].shape) == read.shape == tensor.shape, name
        assert got[name].dtype == read.dtype == tensor.dtype, name
        assert torch.equal(read, tensor), name


def untied(model):
    """The state dict with tied parameters under their first name only, as safetensors files have it."""
    first = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    return {name: tensor for name, tensor in model.state_dict().items() if name in first.values()}


def as_bin(model, folder, shards, archive):
    """``pytorch_model.bin`` as transformers 4.x wrote it, tied parameters under both names."""
    model.config.save_pretrained(folder)
    items = list(model.state_dict().items())
    names = {}
    for shard in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = dict(items[shard::shards])
        torch.save(part, folder / file, _use_new_zipfile_serialization=archive)
        names |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


def rewrite(folder, change):
    """Apply ``change`` to the state dict in a folder."""
    path = folder / "model.safetensors"
    save_file({k: v.clone() for k, v in change(load_file(path)).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", CONFIGS)
def test_as_saved_by_transformers_5(name, tmp_path):
    model_class, model = tiny(name)
    model.save_pretrained(tmp_path)
    assert_equal(open_checkpoint(tmp_path), model_class, tmp_path)
    got = open_checkpoint(tmp_path).weights(model_class)
    for key, tensor in model.state_dict().items():
        assert torch.equal(got[key].read(), tensor), key


@pytest.mark.parametrize("name", OLD_NAMES)
def test_as_saved_by_transformers_4(name, tmp_path):
    model_class, model = tiny(name)
    model.save_pretrained(tmp_path)

    def old_names(_):
        state = untied(model)
        for pattern, replacement in OLD_NAMES[name]:
            state = {re.sub(pattern, replacement, key): tensor for key, tensor in state.items()}
        return state | ({STRAYS[name]: torch.arange(4)} if name in STRAYS else {})

    rewrite(tmp_path, old_names)
    assert_equal(open_checkpoint(tmp_path), model_class, tmp_path)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_own_names_of_the_transformers_5_classes(name, tmp_path):
    model_class, model = tiny(name)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert_equal(open_checkpoint(tmp_path), model_class, tmp_path)


def test_without_the_prefix_of_the_base_model(tmp_path):
    model_class, model = tiny("vilt")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {key.removeprefix("vilt."): tensor for key, tensor in state.items()})
    assert_equal(open_checkpoint(tmp_path), model_class, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tmp_path):
    model_class, model = tiny("qwen2_vl")
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert {tensor.dtype for tensor in checkpoint.weights(model_class).values()} == {getattr(torch, dtype)}
    assert_equal(checkpoint, model_class, tmp_path)


def test_shards(tmp_path):
    model_class, model = tiny("llava")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 2
    assert_equal(checkpoint, model_class, tmp_path)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before-torch-1.6"])
@pytest.mark.parametrize("shards", [1, 2])
def test_bin(tmp_path, shards, archive):
    model_class, model = tiny("qwen2_vl")
    as_bin(model, tmp_path, shards, archive)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) == shards
    got = checkpoint.weights(model_class)
    for name, tensor in model.state_dict().items():
        assert torch.equal(got[name].read(), tensor), name


def test_bin_views_and_transposed_tensors(tmp_path):
    model_class, model = tiny("clip")
    as_bin(model, tmp_path, 1, True)
    whole = torch.randn(48, 64)
    state = model.state_dict()
    state["text_model.encoder.layers.0.mlp.fc1.weight"] = whole[:, 16:48]
    state["text_model.encoder.layers.0.mlp.fc2.weight"] = whole[:, 3:35].t()
    torch.save(state, tmp_path / "pytorch_model.bin")
    got = open_checkpoint(tmp_path).weights(model_class)
    for name, tensor in state.items():
        assert torch.equal(got[name].read(), tensor), name


def test_tied_parameters_are_one_tensor(tmp_path):
    model_class, model = tiny("qwen2_vl")
    model.save_pretrained(tmp_path)
    got = open_checkpoint(tmp_path).weights(model_class)
    assert got["lm_head.weight"] is got["model.language_model.embed_tokens.weight"]


def test_listing_reads_no_tensor(tmp_path):
    """Headers survive a file whose data is replaced by a hole of the same size."""
    model_class, model = tiny("clip")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    size, header = path.stat().st_size, path.read_bytes()
    with path.open("wb") as file:
        file.write(header[: 8 + int.from_bytes(header[:8], "little")])
        file.truncate(size)
    assert len(open_checkpoint(tmp_path).weights(model_class)) == len(model.state_dict())


def drop(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


BROKEN = {
    "missing": (drop("visual_projection.weight"), "1 missing .visual_projection.weight"),
    "unknown": (lambda s: s | {"visual_projection.bias": torch.zeros(3)}, "1 unknown .visual_projection.bias"),
    "shape": (
        lambda s: s | {"visual_projection.weight": torch.zeros(16, 33)},
        r"of another shape .visual_projection.weight \(16, 33\) for visual_projection.weight \(16, 32\)",
    ),
    "many": (lambda s: {}, "missing .*, \\.\\.\\."),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_keys_that_do_not_fit_are_named(kind, tmp_path):
    change, message = BROKEN[kind]
    model_class, model = tiny("clip")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path).weights(model_class)


def test_two_names_for_one_parameter(tmp_path):
    model_class, model = tiny("qwen2_vl")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda s: s | {"model.language_model.norm.weight": s["model.norm.weight"] + 1})
    with pytest.raises(InputError, match=r"given twice .*norm.weight"):
        open_checkpoint(tmp_path).weights(model_class)


def test_tied_by_the_config_but_different_in_the_file(tmp_path):
    model_class, model = tiny("qwen2_vl")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"] + 1})
    with pytest.raises(InputError, match=r"lm_head.weight.*tie_word_embeddings"):
        open_checkpoint(tmp_path).weights(model_class)


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_cut_safetensors(kept, tmp_path):
    _, model = tiny("clip")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        open_checkpoint(tmp_path)


def test_pickled_code_does_not_run(tmp_path):
    _, model = tiny("clip")
    as_bin(model, tmp_path, 1, True)

    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="without running code"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_shards_outside_of_the_folder(tmp_path):
    _, model = tiny("clip")
    model.save_pretrained(tmp_path / "inside")
    shutil.move(tmp_path / "inside/model.safetensors", tmp_path / "model.safetensors")
    index = {"weight_map": {"logit_scale": "../model.safetensors"}}
    (tmp_path / "inside/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="not there"):
        open_checkpoint(tmp_path / "inside")


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nobody-knows-it"}')
    with pytest.raises(InputError, match="transformers cannot read it"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match="no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(InputError, match="quantized"):
        open_checkpoint(tmp_path)
