"""Adapters of every kind, made by peft itself: merged by us they answer as the PeftModel does."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")
peft = pytest.importorskip("peft", reason="needs peft: not installed")

from transformers import pytorch_utils  # noqa: E402

from edge_rsvlm.errors import InputError  # noqa: E402
from edge_rsvlm.export.adapters.reading import read_adapter  # noqa: E402
from edge_rsvlm.export.adapters.resolve import resolve  # noqa: E402
from edge_rsvlm.export.adapters.unmerged import Unmerged  # noqa: E402
from edge_rsvlm.export.adapters.updates import LowRank, Replace, merge  # noqa: E402
from tests.tiny_adapters import MADE, adapted, answer, check  # noqa: E402

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
