"""Files of adapters: names of older versions, old settings, and what is refused, each by name."""

from __future__ import annotations

import json
import pickle
import re

import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
pytest.importorskip("transformers", reason="needs transformers: not installed")
peft = pytest.importorskip("peft", reason="needs peft: not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

from edge_rsvlm.errors import InputError  # noqa: E402
from edge_rsvlm.export.adapters.reading import read_adapter  # noqa: E402
from edge_rsvlm.export.adapters.resolve import resolve  # noqa: E402
from tests.tiny_adapters import adapted, answer, check, clip, make, merged  # noqa: E402

OLD_NAMES = {
    "qwen2_vl": [(r"^model\.language_model", "model"), (r"^model\.visual", "visual")],
    "qwen2_5_vl": [(r"^model\.language_model", "model"), (r"^model\.visual", "visual")],
    "llava": [
        (r"^model\.language_model", "language_model.model"), (r"^model\.multi", "multi"),
        (r"^lm_head", "language_model.lm_head"), (r"^model\.vision_tower", "vision_tower.vision_model"),
    ],
    "llava 4.52": [(r"^model\.vision_tower", "model.vision_tower.vision_model")],
    "llava, its own code": [(r"^model\.language_model", "model")],
    "llama in llava": [(r"^model\.language_model\.", "")],
}  # fmt: skip


def rename(folder, rules, prefix="base_model.model."):
    """Rewrite names as another version of transformers wrote them, in tensors and patterns."""

    def renamed(name):
        for old, new in rules:
            name = re.sub(old, new, name)
        return name

    path = folder / "adapter_model.safetensors"
    tensors = {prefix + renamed(k.removeprefix("base_model.model.")): v for k, v in load_file(path).items()}
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("names", OLD_NAMES)
def test_old_names(names, tmp_path):
    family = names.split()[0].strip(",") if names != "llama in llava" else "llava"
    text_only = names.startswith(("llava, its", "llama"))
    config = {
        "target_modules": r".*language_model.*(q_proj|up_proj)" if text_only else "all-linear",
        "modules_to_save": None if text_only or family != "llava" else ["multi_modal_projector", "lm_head"],
        "bias": "none" if text_only else "all",
    }
    base, model = adapted(family, tmp_path, **config)
    new = resolve([read_adapter(tmp_path)], base)
    before = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert set(rename(tmp_path, OLD_NAMES[names])) != before
    assert resolve([read_adapter(tmp_path)], base).updates.keys() == new.updates.keys()
    check(family, base, [read_adapter(tmp_path)], answer(family, model))


def test_patterns_speak_of_the_names_in_training(tmp_path):
    pattern = {r"^model.language_model.layers.1.self_attn.q_proj": 2}
    base, model = adapted("qwen2_vl", tmp_path, rank_pattern=pattern)
    rename(tmp_path, OLD_NAMES["qwen2_vl"])
    with pytest.raises(InputError, match="rank 2, but"):
        read_adapter(tmp_path)
    edit(tmp_path, rank_pattern={"^model.layers.1.self_attn.q_proj": 2})
    check("qwen2_vl", base, [read_adapter(tmp_path)], answer("qwen2_vl", model))


def test_adapter_of_llava_own_code_keeps_its_projector_beside(tmp_path):
    config = {"target_modules": r".*language_model.*q_proj", "modules_to_save": ["multi_modal_projector"]}
    base, model = adapted("llava", tmp_path, **config)
    tensors = rename(tmp_path, OLD_NAMES["llava, its own code"])
    beside = {
        re.sub(r"multi_modal_projector.linear_(\d)", lambda m: f"mm_projector.{2 * int(m[1]) - 2}", k): v
        for k, v in tensors.items()
        if "projector" in k
    }
    assert len(beside) == 4
    torch.save(beside, tmp_path / "non_lora_trainables.bin")
    save_file({k: v for k, v in tensors.items() if "projector" not in k}, tmp_path / "adapter_model.safetensors")
    check("llava", base, [read_adapter(tmp_path)], answer("llava", model))


def test_bin_files_and_raw_names(tmp_path):
    config = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["linear_2"], "use_dora": True}
    base, model = adapted("llava", tmp_path, **config)
    raw = {k: v for k, v in model.state_dict().items() if "lora" in k or "modules_to_save" in k}
    assert any(".default" in k for k in raw)
    (tmp_path / "adapter_model.safetensors").unlink()
    for legacy in (False, True):
        torch.save(raw, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=not legacy)
        check("llava", base, [read_adapter(tmp_path)], answer("llava", model))


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v != "remove"}))


@pytest.fixture
def saved(tmp_path):
    """A sound adapter to break: its base and its folder."""
    base, _ = adapted("llava", tmp_path / "lora", target_modules=["q_proj", "linear_1"])
    return base, tmp_path / "lora"


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q0 = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def test_a_key_without_a_place_is_named_with_the_nearest(saved):
    base, folder = saved
    rewrite(
        folder, lambda t: [t.update({k.replace("layers.0", "layers.7"): t.pop(k)}) for k in list(t) if k.startswith(Q0)]
    )
    with pytest.raises(InputError) as error:
        resolve([read_adapter(folder)], base)
    assert "'model.language_model.layers.7.self_attn.q_proj.weight'" in str(error.value)
    assert re.search(r"nearest: 'model\.language_model\.layers\.[01]\.self_attn\.q_proj\.weight'", str(error.value))


BROKEN = {
    "half a pair": (lambda t: t.pop(f"{Q0}.lora_B.weight"), "is no pair of A and B: lora_A"),
    "unknown part": (lambda t: t.update({f"{Q0}.lora_C.weight": torch.zeros(2)}), "no place for .*lora_C"),
    "wrong width": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.zeros(4, 31)}),
        "shape .*32, 31.* the model .*32, 32",
    ),
    "wrong rank": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.zeros(3, 32)}),
        "rank 3, but adapter_config.json says 4",
    ),
    "empty shard": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.zeros(0)}), "is empty; gather the shards"),
    "words added": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(70, 32)}),
        "resize the embeddings",
    ),
    "not finite": (lambda t: t[f"{Q0}.lora_A.weight"].fill_(float("nan")), "not finite"),
    "same twice": (
        lambda t: t.update(
            {k.replace("model.model.language_model", "model.language_model.model"): v.clone() for k, v in t.items()}
        ),
        "are both 'model.language_model",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors(case, saved):
    base, folder = saved
    change, message = BROKEN[case]
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        merged(base, resolve([read_adapter(folder)], base))


CONFIGS = {
    "other kind": ({"peft_type": "LOKR"}, "'LOKR' adapters are not supported"),
    "no kind": ({"peft_type": "remove"}, "'None' adapters"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' initialisation changed"),
    "loftq": ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer replication"),
    "activated": ({"alora_invocation_tokens": [3]}, "activated LoRA"),
    "from the future": ({"use_zeta_lora": True}, "does not know: use_zeta_lora"),
    "no rank": ({"r": "remove"}, "not a LoRA config.*r"),
    "bad rank": ({"r": 0}, "not a LoRA config"),
    "bad pattern": ({"rank_pattern": {"(": 4}}, "not a LoRA config"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_refused_configs(case, saved):
    changes, message = CONFIGS[case]
    edit(saved[1], **changes)
    with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
        read_adapter(saved[1])


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "IA3Config", "AdaLoraConfig", "VeraConfig"])
def test_other_kinds_of_adapters_are_refused_by_name(kind, tmp_path):
    options = {"feedforward_modules": ["q_proj"]} if kind == "IA3Config" else {}
    options |= {"total_step": 10} if kind == "AdaLoraConfig" else {}
    config = getattr(peft, kind)(target_modules=["q_proj"], **options)
    peft.get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"'{config.peft_type.value}' adapters are not supported.*merge_and_unload"):
        read_adapter(tmp_path)


def test_old_configs_are_read(saved):
    base, folder = saved
    wanted = answer("llava", merged(base, resolve([read_adapter(folder)], base)))
    config = json.loads((folder / "adapter_config.json").read_text())
    old = {k: config[k] for k in ("peft_type", "r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out")}
    old |= {"enable_lora": None, "merge_weights": False, "rank_pattern": None, "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(old))
    assert torch.equal(answer("llava", merged(base, resolve([read_adapter(folder)], base))), wanted)


def test_files_that_are_no_adapter(saved, tmp_path):
    _, folder = saved
    with pytest.raises(InputError, match="name one of its adapters: lora"):
        read_adapter(tmp_path)
    with pytest.raises(InputError, match="not a number"):
        read_adapter(folder, float("nan"))
    content = (folder / "adapter_model.safetensors").read_bytes()
    for cut in (0, 7, len(content) // 2):
        (folder / "adapter_model.safetensors").write_bytes(content[:cut])
        with pytest.raises(InputError, match=r"cannot read .*safetensors"):
            read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"none of adapter_model\.safetensors"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        read_adapter(folder)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


def test_pickles_are_never_executed(saved):
    _, folder = saved
    (folder / "adapter_model.safetensors").unlink()
    for content in (pickle.dumps({"a": Bomb()}), b"", b"PK\x03\x04 not a zip"):
        (folder / "adapter_model.bin").write_bytes(content)
        with pytest.raises(InputError, match="cannot read"):
            read_adapter(folder)
    torch.save({"a": Bomb()}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match="cannot read"):
        read_adapter(folder)


def test_ambiguous_names_are_refused(saved):
    base, folder = clip(), saved[1]
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if "language_model" not in k])
    rename(folder, [(r"^model\.language_model", "encoder")])
    with pytest.raises(InputError, match="could belong to text_model or vision_model"):
        resolve([read_adapter(folder)], base)
