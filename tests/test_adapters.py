"""Adapters of every kind, made by peft itself: merged by us they answer as the PeftModel does."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")
peft = pytest.importorskip("peft", reason="needs peft: not installed")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import pytorch_utils  # noqa: E402

from edge_rsvlm.errors import InputError  # noqa: E402
from edge_rsvlm.export.adapters.reading import read_adapter  # noqa: E402
from edge_rsvlm.export.adapters.resolve import resolve  # noqa: E402
from edge_rsvlm.export.adapters.unmerged import Unmerged  # noqa: E402
from edge_rsvlm.export.adapters.updates import LowRank, Replace, merge  # noqa: E402

TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**TEXT, "intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
OPT = {**TEXT, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "eos_token_id": 2}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
DUAL_TEXT = {
    **TEXT, "intermediate_size": 48, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN_TEXT = {
    **LLAMA,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
QWEN_IDS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 59}
IMAGE = 63


def clip():
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=DUAL_TEXT, vision_config=VISION))


def siglip():
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=DUAL_TEXT, vision_config=VISION))


def llava(**changes):
    text, vision = {"model_type": "llama", **LLAMA}, {"model_type": "clip_vision_model", **VISION}
    config = {"text_config": text, "vision_config": vision, "image_token_index": IMAGE, **changes}
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**config))


def qwen2_vl(tie=True):
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config=QWEN_TEXT, vision_config=vision, tie_word_embeddings=tie, **QWEN_IDS
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl():
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4,
        "fullatt_block_indexes": [1], "window_size": 16,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_IDS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def smolvlm():
    text = {"model_type": "llama", "pad_token_id": 0, **LLAMA}
    config = transformers.SmolVLMConfig(text_config=text, vision_config=VISION, scale_factor=2, image_token_id=IMAGE)
    return transformers.SmolVLMForConditionalGeneration(config)


def blip_2():
    qformer = {**TEXT, "intermediate_size": 48, "encoder_hidden_size": 32}
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=qformer, text_config={"model_type": "opt", **OPT}, num_query_tokens=4,
        image_token_index=IMAGE,
    )  # fmt: skip
    return transformers.Blip2ForConditionalGeneration(config)


def opt():
    return transformers.OPTForCausalLM(transformers.OPTConfig(**OPT))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


IMAGE_TOKENS = {"llava": 4, "qwen2_vl": 4, "qwen2_5_vl": 4, "smolvlm": 1, "blip_2": 4}
TOKEN_OF = {"qwen2_vl": 60, "qwen2_5_vl": 60}
MADE = {f.__name__: f for f in (clip, siglip, llava, qwen2_vl, qwen2_5_vl, smolvlm, blip_2, opt, llama)}
TEXT_LINEARS = ["q_proj", "v_proj"]


def make(family, **options):
    torch.manual_seed(0)
    return MADE[family](**options).eval()


def answer(family, model):
    """Everything that the model computes of one image and one text, as one vector."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    tokens = TOKEN_OF.get(family, IMAGE)
    ids = torch.tensor([[1, *[tokens] * IMAGE_TOKENS.get(family, 0), 5, 3, 4, 2]])
    inputs = {"input_ids": ids}
    if family in ("clip", "siglip", "llava", "blip_2"):
        inputs["pixel_values"] = pixels
    if family == "smolvlm":
        inputs["pixel_values"] = pixels[:, None]
    if family.startswith("qwen"):
        inputs["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        inputs["mm_token_type_ids"] = (ids == tokens).long()
    with torch.no_grad():
        out = model(**inputs)
    if family in ("clip", "siglip"):
        return torch.cat([out.image_embeds.flatten(), out.text_embeds.flatten()])
    return out.logits.flatten()


def adapted(family, folder, *, seed=1, base=None, **config):
    """Saves a random adapter of this kind in ``folder``; returns its base, and the PeftModel."""
    base = base or make(family)
    config = {"r": 4, "target_modules": TEXT_LINEARS, **config}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or "original_module" in name:
                continue
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return base, model


def merged(base, resolution):
    """The base with every tensor replaced by its merge, as an export does it."""
    config = copy.deepcopy(base.config)
    if resolution.untied:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    model = type(base)(config).eval()
    state = {k: merge(v, resolution.updates.get(k, ())) for k, v in base.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model


def check(family, base, adapters, expected):
    """Merged and unmerged equal ``expected``, and differ from the base."""
    resolution = resolve(adapters, base)
    assert expected.shape == answer(family, base).shape
    assert not torch.allclose(expected, answer(family, base), atol=1e-3)
    torch.testing.assert_close(answer(family, merged(base, resolution)), expected, atol=1e-5, rtol=1e-5)
    before = copy.deepcopy(base.state_dict())
    with Unmerged(base, resolution.updates) as unmerged:
        torch.testing.assert_close(answer(family, unmerged), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    return resolution


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.(layers|layer|blocks)\.1\..*(q_proj|attention\.query|qkv|fc1)"},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6},
        "alpha_pattern": {"^.*layers.0.*": 5},
        "lora_alpha": 9,
    },
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "biases": {"bias": "all", "target_modules": "all-linear"},
    "own biases": {"bias": "lora_only", "target_modules": ["q_proj", "fc1"]},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
}
CALCULUS = ("rslora", "patterns", "one layer", "own biases")
"""Kinds that differ in numbers only, not in names: one family is enough."""
CASES = [(family, kind) for family in MADE for kind in KINDS if family == "llava" or kind not in CALCULUS]


@pytest.mark.parametrize(("family", "kind"), CASES, ids=lambda x: x)
def test_merged_answers_as_peft_does(family, kind, tmp_path):
    base, model = adapted(family, tmp_path, **KINDS[kind])
    resolution = check(family, base, [read_adapter(tmp_path)], answer(family, model))
    assert not resolution.untied
    reference = model.merge_and_unload().state_dict()
    for name, tensor in base.state_dict().items():
        if not resolution.notes or "head.attention.out_proj" not in name:
            torch.testing.assert_close(
                merge(tensor, resolution.updates.get(name, ())), reference[name], atol=1e-6, rtol=0
            )


SPECIAL = {
    "convolutions": ("llava", {"target_modules": ["patch_embedding", "fc2"]}),
    "3-d convolution": ("qwen2_vl", {"target_modules": ["proj"]}),
    "dora convolution": ("llava", {"target_modules": ["patch_embedding"], "use_dora": True}),
    "bias on b": ("smolvlm", {"target_modules": ["patch_embedding", "fc1"], "lora_bias": True}),
    "embeddings": ("llava", {"target_modules": ["embed_tokens", "lm_head"]}),
    "dora embeddings": ("llava", {"target_modules": ["embed_tokens", "token_embedding"], "use_dora": True}),
    "projector saved": ("llava", {"modules_to_save": ["multi_modal_projector"]}),
    "vision saved": ("siglip", {"modules_to_save": ["vision_model"], "target_modules": r"text_model.*q_proj"}),
    "query tokens": ("blip_2", {"modules_to_save": ["language_projection", "qformer"]}),
    "tokens": ("llava", {"trainable_token_indices": [3, 5]}),
    "tokens of two": ("llava", {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}}),
    "attention itself": ("siglip", {"target_modules": ["attention", "fc1"]}),
    "tied tokens": ("qwen2_vl", {"trainable_token_indices": [3, 5]}),
    "tied lora": ("qwen2_vl", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied saved": ("qwen2_vl", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_merged_answers_as_peft_does_on_other_modules(kind, tmp_path):
    family, config = SPECIAL[kind]
    base, model = adapted(family, tmp_path, **config)
    assert not check(family, base, [read_adapter(tmp_path)], answer(family, model)).untied


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"lm_head": [3, 5]}},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen2_vl", "opt", "blip_2"])
def test_one_use_of_a_tied_tensor_unties_it(family, config, tmp_path):
    """peft adapts the one use only, and its own merge then changes the other too."""
    base, model = adapted(family, tmp_path, **config)
    resolution = check(family, base, [read_adapter(tmp_path)], answer(family, model))
    assert resolution.untied == tuple(base.all_tied_weights_keys.items())


def test_several_adapters_are_weighted_changes_of_the_same_base(tmp_path):
    base, _ = adapted("llava", tmp_path / "a", target_modules=["q_proj", "linear_1"])
    adapted("llava", tmp_path / "b", seed=2, use_rslora=True, r=2, target_modules=["q_proj", "fc1"])
    adapted("llava", tmp_path / "c", seed=3, use_dora=True, target_modules=["q_proj"])
    weights = {"a": 0.7, "b": -0.4, "c": 0.5}
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name, weight in weights.items():
        whole = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).merge_and_unload()
        for key, tensor in whole.state_dict().items():
            state[key] += weight * (tensor - base.state_dict()[key])
    wanted = copy.deepcopy(base)
    wanted.load_state_dict(state)
    check("llava", base, [read_adapter(tmp_path / n, w) for n, w in weights.items()], answer("llava", wanted))


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


def test_adapters_that_disagree(tmp_path):
    saved_head = {"modules_to_save": ["lm_head"]}
    base, _ = adapted("llava", tmp_path / "a", **saved_head)
    adapted("llava", tmp_path / "b", seed=2, **saved_head)
    adapted("llava", tmp_path / "c", target_modules=["lm_head"])
    adapted("llava", tmp_path / "d", trainable_token_indices=[3])
    adapted("llava", tmp_path / "e", trainable_token_indices=[3, 4], seed=2)
    shutil.copytree(tmp_path / "a", tmp_path / "same")
    for names in ("ab", "ac", "de"):
        with pytest.raises(InputError, match=r"set '.*(lm_head|embed_tokens)\.weight' differently"):
            resolve([read_adapter(tmp_path / n) for n in names], base)
    for name in "ad":
        with pytest.raises(InputError, match=r"cannot be done by a weight of 0\.5"):
            resolve([read_adapter(tmp_path / name, 0.5)], base)
    copies = resolve([read_adapter(tmp_path / "a"), read_adapter(tmp_path / "same")], base)
    assert len(copies.updates["lm_head.weight"]) == 1


def test_ambiguous_names_are_refused(saved):
    base, folder = clip(), saved[1]
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if "language_model" not in k])
    rename(folder, [(r"^model\.language_model", "encoder")])
    with pytest.raises(InputError, match="could belong to text_model or vision_model"):
        resolve([read_adapter(folder)], base)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_models_without_data_are_enough(family, tmp_path):
    base, _ = adapted(family, tmp_path, target_modules=["q_proj", "embed_tokens"])
    with torch.device("meta"):
        bare = MADE[family]()
    with_data, without = (resolve([read_adapter(tmp_path)], model) for model in (base, bare))
    assert without.updates.keys() == with_data.updates.keys()
    assert bool(without.untied) == (family == "qwen2_vl") == bool(with_data.untied)
    for name, updates in without.updates.items():
        tensor = base.state_dict()[name]
        assert torch.equal(merge(tensor, updates), merge(tensor, with_data.updates[name]))


def test_output_layer_inside_attention_is_noted(tmp_path):
    """Its own forward is never called: peft trains nothing there, and only its merge would use it."""
    base, model = adapted("siglip", tmp_path, target_modules=["out_proj"])
    resolution = check("siglip", base, [read_adapter(tmp_path)], answer("siglip", model))
    assert "vision_model.head.attention.out_proj' has no effect" in resolution.notes[0]


def test_layers_that_the_graph_never_reads_are_used_keys(tmp_path):
    base, model = adapted("llava", tmp_path, target_modules=r".*(vision_tower|language_model).*q_proj")
    resolution = check("llava", base, [read_adapter(tmp_path)], answer("llava", model))
    assert "model.vision_tower.encoder.layers.1.self_attn.q_proj.weight" in resolution.updates


def test_transposed_linear_layers(tmp_path):
    layer = pytorch_utils.Conv1D(5, 3)
    x, a, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(5, 4)
    update = LowRank("a", 1.0, 0.5, a.T, b.T, True)
    wanted = layer(x) + 0.5 * x @ a.T @ b.T
    with Unmerged(layer, {"weight": (update,)}), torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)
    layer.weight.data = merge(layer.weight.data, [update])
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_float32_whatever_is_stored(dtype):
    generator = np.random.default_rng(0)
    tensor, up, down = (torch.tensor(generator.normal(size=s)).to(dtype) for s in ((7, 300), (7, 3), (3, 300)))
    update = LowRank("a", 0.3, 2.0, up, down, False)
    exact = tensor.double() + 0.3 * 2.0 * up.double() @ down.double()
    torch.testing.assert_close(merge(tensor, [update], torch.float32).double(), exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(merge(tensor, [update]), merge(tensor, [update], torch.float32).to(dtype))
    with pytest.raises(InputError, match=r"not finite in torch\.float16"):
        merge(
            torch.full((2, 2), 6e4),
            [LowRank("a", 1.0, 1.0, torch.ones(2, 1), torch.full((1, 2), 6e4), False)],
            torch.float16,
        )


@pytest.mark.parametrize("columns_out", [False, True])
def test_blocks_of_rows_give_what_one_block_gives(columns_out, monkeypatch):
    torch.manual_seed(0)
    tensor, up, down = torch.randn(37, 6), torch.randn(37, 2), torch.randn(2, 6)
    update = LowRank("a", 0.7, 1.5, up, down, columns_out, torch.rand(6 if columns_out else 37))
    whole = merge(tensor, [update])
    monkeypatch.setattr("edge_rsvlm.export.adapters.updates.BLOCK_BYTES", 6 * 4 * 5)
    torch.testing.assert_close(merge(tensor, [update]), whole)


def test_nothing_to_do_gives_the_tensor_itself():
    tensor = torch.randn(3, 4)
    assert merge(tensor, []) is tensor
    assert merge(torch.tensor(3), [Replace("a", 1.0, torch.tensor(5), True)]).item() == 5
