"""The ground side on untrained weights: layouts, targets, artifacts and splits."""

from __future__ import annotations

import numpy as np
import pytest

from edge_rsvlm.errors import InputError

pytestmark = pytest.mark.usefixtures("torch_here")


@pytest.fixture
def torch_here(needs):
    for name in ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors"):
        needs(name)


def test_packed_sentences_do_not_see_each_other():
    import torch

    from edge_rsvlm.export.default.model.decoder import Decoder, DecoderConfig, packed_layout

    torch.manual_seed(3)
    decoder = Decoder(DecoderConfig(300, layers=2, dropout=0.0)).eval()
    prefix, first, second = torch.randn(1, 6, 256), torch.randn(1, 3, 256), torch.randn(1, 3, 256)
    positions, mask = packed_layout(6, 2, 3)
    with torch.inference_mode():
        packed, _ = decoder(torch.cat([prefix, first, second], 1), positions[None], mask)
        causal = torch.ones(9, 9, dtype=torch.bool).tril()
        alone, _ = decoder(torch.cat([prefix, second], 1), torch.arange(9)[None], causal)
    torch.testing.assert_close(packed[:, 9:], alone[:, 6:], atol=1e-5, rtol=1e-4)


def test_dihedral_boxes_follow_the_pixels():
    from edge_rsvlm.export.default.data.views import dihedral, dihedral_boxes

    tile = np.zeros((1, 20, 20))
    tile[0, 3:5, 11:16] = 1
    box = np.array([[11.0, 3, 16, 5]])
    for view in range(8):
        turned = dihedral(tile, view)[0]
        x0, y0, x1, y1 = dihedral_boxes(box, 20, view)[0].astype(int)
        assert turned[y0:y1, x0:x1].all() and turned.sum() == turned[y0:y1, x0:x1].sum()


def test_groups_join_by_name_and_by_likeness_and_stay_together():
    from edge_rsvlm.export.default.splits import choose, grouped

    names = ["a_1", "a_2", "b", "c", "d", "e"]
    features = np.eye(6, dtype=np.float32)
    features[3] = features[2]
    groups = grouped(names, ["a", "a", "b", "c", "d", "e"], features)
    assert sorted(map(tuple, groups)) == [("a_1", "a_2"), ("b", "c"), ("d",), ("e",)]
    chosen = set(choose(groups, 0.5))
    assert len(chosen) == 3 and all(chosen.issuperset(g) or chosen.isdisjoint(g) for g in groups)


def test_held_out_images_are_not_trained_on(needs, tmp_path):
    from edge_rsvlm.export.default.data.objects import SETS, ObjectData
    from edge_rsvlm.export.default.splits import held_out

    data = needs("data", "drone_vehicles").parent
    spec = next(s for s in SETS if s.name == "drone_vehicles")
    kept = ObjectData(spec, data, tmp_path, held_out(spec.name))
    assert held_out(spec.name) and not held_out(spec.name) & set(kept.names)


def test_an_artifact_is_reused_only_for_the_same_recipe(tmp_path):
    import torch

    from edge_rsvlm.export import artifact

    digest = artifact.stage_hash("s", {"rate": 1}, [])
    written = artifact.write(tmp_path / "s", "s", digest, {"rate": 1}, {}, {"a.w": torch.ones(3)}, {"t.txt": "é"})
    assert artifact.find(tmp_path / "s", digest) == written
    assert artifact.find(tmp_path / "s", artifact.stage_hash("s", {"rate": 2}, [])) is None
    assert (tmp_path / "s" / "t.txt").read_text(encoding="utf-8") == "é"
    assert artifact.part(written.tensors(), "a")["w"].tolist() == [1, 1, 1]
    (tmp_path / "s" / "t.txt").write_text("other")
    with pytest.raises(InputError, match=r"t\.txt"):
        artifact.find(tmp_path / "s", digest)
    with pytest.raises(FileNotFoundError, match="run the stage"):
        artifact.load(tmp_path / "absent")


def test_tokens_survive_the_round_trip():
    from edge_rsvlm.export.default.data.captions import points_somewhere, tidy, train_tokenizer

    captions = [tidy(c) for c in ("There are  2 Planes .", "a road , in the left .")]
    assert captions == ["there are 2 planes", "a road, in the left"]
    tokenizer = train_tokenizer(captions)
    assert [tokenizer.decode(tokenizer.encode(c).ids) for c in captions] == captions
    assert [points_somewhere(c) for c in captions] == [False, True]
