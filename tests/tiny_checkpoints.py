"""Tiny random checkpoints, written by ``save_pretrained`` with real tokenizer and processor files.

``as_4x`` rewrites a folder into what transformers 4.x wrote. Weights are drawn wider than initialisations are, biases
and norms too, so that nothing that is forgotten can be 0 or 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers  # noqa: E402
from torch import nn  # noqa: E402

WIDTH, HEADS, LAYERS = 32, 2, 2
PATCH_PX, SIDE_PX = 16, 64
ANSWERS = ("yes", "no", "two", "an airport", "green")
CORPUS = [
    "a photo of a cat", "this is a photo of an airplane", "what is the colour of the roof?",
    "how many ships are there?", "two airplanes are parked beside the terminal",
    "a satellite photo of a harbour with ships and a green field", "is there a road between the buildings?",
    "trees, water and three red cars near the runway",
]  # fmt: skip


def word_pieces(folder: Path) -> Path:
    """BERT's ``vocab.txt``."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    path = folder / "vocab.txt"
    path.write_text("".join(f"{word}\n" for word, _ in vocabulary))
    return path


def byte_pairs(folder: Path) -> tuple[Path, Path]:
    """CLIP's ``vocab.json`` and ``merges.txt``: word ends marked, the two special tokens last."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    words = [*model["vocab"], *(f"{letter}</w>" for letter in letters)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: index for index, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"]))
    return vocabulary, merges


def sentence_pieces(folder: Path) -> Path:
    """SigLIP's ``spiece.model``."""
    spm = pytest.importorskip("sentencepiece", reason="needs sentencepiece: not installed")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(CORPUS))
    spm.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=150, hard_vocab_limit=False, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    (folder / "spiece.vocab").unlink()
    return folder / "spiece.model"


def bert_tokenizer(folder: Path, longest: int = 40):
    return transformers.BertTokenizer(str(word_pieces(folder)), model_max_length=longest)


def clip_tokenizer(folder: Path, longest: int, pad: str = "<|endoftext|>"):
    vocabulary, merges = byte_pairs(folder)
    return transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=longest, pad_token=pad)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, statistics of batch norms too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.2 * parameter[0].numel() ** -0.5)
            elif name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def save(folder: Path, model: nn.Module, processor) -> Path:
    """As transformers 5.x writes it; ``processor`` may be a tokenizer alone."""
    randomise(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    if (folder / "tokenizer.json").exists():
        for name in ("vocab.txt", "vocab.json", "merges.txt"):
            (folder / name).unlink(missing_ok=True)
    return folder


def as_4x(folder: Path) -> Path:
    """The same checkpoint as transformers 4.x and its forerunners wrote it: other file names, keys and spellings."""
    _edit(folder / "config.json", _config_4x)
    if (folder / "processor_config.json").exists():
        images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
        (folder / "preprocessor_config.json").write_text(json.dumps(_images_4x(images)))
        (folder / "processor_config.json").unlink()
    _edit(folder / "tokenizer_config.json", _tokenizer_4x)
    if (folder / "tokenizer.json").exists():
        _slow_files(folder)
    return folder


def _edit(path: Path, change: Callable[[dict], dict]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _config_4x(config: dict) -> dict:
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.21.0"
    for part in (config.get("text_config"), config.get("vision_config")):
        if part is not None:
            part.pop("dtype", None)
    if config["model_type"] == "clip":  # its first configs all say so, whatever the vocabulary
        config["text_config"] |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
        config |= {f"{part}_config_dict": dict(config[f"{part}_config"]) for part in ("text", "vision")}
    return config


def _images_4x(images: dict) -> dict:
    kind = images.pop("image_processor_type")
    if kind in ("CLIPImageProcessor", "OwlViTImageProcessor", "ViltImageProcessor", "ViTImageProcessor"):
        images["feature_extractor_type"] = kind.replace("ImageProcessor", "FeatureExtractor")
        images["size"] = images["size"].get("shortest_edge") or [images["size"]["height"], images["size"]["width"]]
        if images.get("crop_size"):
            images["crop_size"] = images["crop_size"]["height"]
    else:
        images["image_processor_type"] = kind
    return images


def _tokenizer_4x(config: dict) -> dict:
    config.pop("backend", None)
    return config | {"special_tokens_map_file": None, "name_or_path": "somewhere/else"}


def _slow_files(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    words = [word for word, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    if model["type"] == "WordPiece":
        (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    else:
        merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in merges))
    (folder / "tokenizer.json").unlink()


def tower(**more) -> dict:
    return {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
    } | more  # fmt: skip


def vision(**more) -> dict:
    return tower(image_size=SIDE_PX, patch_size=PATCH_PX) | more


def clip(folder: Path) -> Path:
    tokenizer = clip_tokenizer(folder, 24)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = transformers.CLIPConfig(
        text_config=tower(vocab_size=len(tokenizer), max_position_embeddings=24, **ends),
        vision_config=vision(),
        projection_dim=16,
    )
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size=SIDE_PX)
    return save(folder, transformers.CLIPModel(config), transformers.CLIPProcessor(images, tokenizer))


def siglip(folder: Path) -> Path:
    tokenizer = transformers.SiglipTokenizer(str(sentence_pieces(folder)), model_input_names=["input_ids"])
    config = transformers.SiglipConfig(
        text_config=tower(vocab_size=len(tokenizer), max_position_embeddings=64, projection_size=WIDTH),
        vision_config=vision(),
    )
    images = transformers.SiglipImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX})
    return save(folder, transformers.SiglipModel(config), transformers.SiglipProcessor(images, tokenizer))


def align(folder: Path) -> Path:
    tokenizer = bert_tokenizer(folder)
    config = transformers.AlignConfig(
        text_config=tower(vocab_size=len(tokenizer), max_position_embeddings=40),
        vision_config={
            "image_size": SIDE_PX, "width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": WIDTH,
            "kernel_sizes": [3, 5], "in_channels": [32, 16], "out_channels": [16, 128], "strides": [1, 2],
            "num_block_repeats": [1, 2], "expand_ratios": [1, 6], "depthwise_padding": [],
        },
        projection_dim=WIDTH,
    )  # fmt: skip
    images = transformers.EfficientNetImageProcessorPil(
        size={"height": 80, "width": 80}, crop_size={"height": SIDE_PX, "width": SIDE_PX}, do_center_crop=True,
        rescale_factor=1 / 127.5, rescale_offset=True, include_top=False, do_normalize=False,
    )  # fmt: skip
    return save(folder, transformers.AlignModel(config), transformers.AlignProcessor(images, tokenizer))


def swin_bert(folder: Path) -> Path:
    tokenizer = bert_tokenizer(folder)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.SwinConfig(
            image_size=SIDE_PX, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        transformers.BertConfig(**tower(vocab_size=len(tokenizer), max_position_embeddings=40)),
        projection_dim=16,
    )
    images = transformers.ViTImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX})
    processor = transformers.VisionTextDualEncoderProcessor(images, tokenizer)
    return save(folder, transformers.VisionTextDualEncoderModel(config), processor)


def _owl(folder: Path, name: str, images) -> Path:
    tokenizer = clip_tokenizer(folder, 16, pad="!")
    config = getattr(transformers, f"{name}Config")(
        text_config=tower(
            vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=vision(),
        projection_dim=WIDTH,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    return save(folder, model, getattr(transformers, f"{name}Processor")(images, tokenizer))


def owlvit(folder: Path) -> Path:
    return _owl(folder, "OwlViT", transformers.OwlViTImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX}))


def owlv2(folder: Path) -> Path:
    return _owl(folder, "Owlv2", transformers.Owlv2ImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX}))


def labels() -> dict:
    return {"id2label": dict(enumerate(ANSWERS)), "label2id": {name: index for index, name in enumerate(ANSWERS)}}


def vilt(folder: Path) -> Path:
    tokenizer = bert_tokenizer(folder)
    config = transformers.ViltConfig(
        **vision(vocab_size=len(tokenizer), max_position_embeddings=40, modality_type_vocab_size=2), **labels()
    )
    images = transformers.ViltImageProcessorPil(size={"shortest_edge": SIDE_PX}, size_divisor=PATCH_PX)
    return save(folder, transformers.ViltForQuestionAnswering(config), transformers.ViltProcessor(images, tokenizer))


def visual_bert(folder: Path) -> Path:
    tokenizer = bert_tokenizer(folder)
    config = transformers.VisualBertConfig(
        **tower(vocab_size=len(tokenizer), max_position_embeddings=40, visual_embedding_dim=24), **labels()
    )
    return save(folder, transformers.VisualBertForQuestionAnswering(config), tokenizer)


ENCODERS: dict[str, Callable[[Path], Path]] = {
    build.__name__: build for build in (clip, siglip, align, swin_bert, owlvit, owlv2, vilt, visual_bert)
}
