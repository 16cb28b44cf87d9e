"""What the stages that read words are taught: tokens, what counts of a sequence, and what holds of which image."""

from __future__ import annotations

import numpy as np
import pytest

for name in ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors"):
    pytest.importorskip(name, reason=f"needs {name}: not installed")


def test_the_tokenizer_reads_questions_as_they_are_typed(tokenizer):
    ids = tokenizer.encode("<ask>Does this picture contain trees?<answer>", add_special_tokens=False)
    plain = tokenizer.encode("<ask>does this picture contain trees<answer>", add_special_tokens=False)
    assert ids.ids == plain.ids and ids.tokens[0] == "<ask>" and ids.tokens[-1] == "<answer>"


def test_only_answers_are_learnt(tokenizer):
    from edge_rsvlm.export.default.stages.language import IGNORE, padded

    batch = padded(tokenizer, [[("<ask>many cars<answer>", "two"), ("<bos>", "two green trees")]], 3)
    fed, expected = batch["fed"][0], batch["expected"][0]
    prompt = len(tokenizer.encode("<ask>many cars<answer>", add_special_tokens=False).ids)
    assert (expected[0, : prompt - 1] == IGNORE).all() and expected[0, prompt - 1] != IGNORE
    for row in (0, 1):
        last = int((expected[row] != IGNORE).nonzero().max())
        assert expected[row, last] == tokenizer.token_to_id("<eos>")
        told = expected[row] != IGNORE
        np.testing.assert_array_equal(fed[row, 1 : last + 1][told[:last]], expected[row, :last][told[:last]])
    assert (expected[2] == IGNORE).all(), "an image with fewer sentences learns nothing from the rest"
    assert batch["asked"].tolist() == [[True, False, False]]


def test_answers_weigh_as_much_as_captions(tokenizer):
    import torch

    from edge_rsvlm.export.default.likelihood import likelihood
    from edge_rsvlm.export.default.model.decoder import DecoderConfig
    from edge_rsvlm.export.default.model.language import TOKEN_CHANNELS, Language
    from edge_rsvlm.export.default.stages.language import IGNORE, loss, padded

    torch.manual_seed(0)
    model = Language(DecoderConfig(tokenizer.get_vocab_size(), dropout=0.0)).eval()
    said = [[("<ask>many cars<answer>", "two"), ("<bos>", "two green trees")]]
    batch = padded(tokenizer, said, 3) | {"tokens": torch.randn(1, TOKEN_CHANNELS, 2, 2)}
    with torch.inference_mode():
        whole, apart = (loss(model, batch, 0.0, apart=apart) for apart in (False, True))
        silent = loss(model, batch | {"asked": torch.zeros(1, 3, dtype=torch.bool)}, 0.0, apart=True)
    answers, captions = ((batch["expected"][0, row] != IGNORE).sum() for row in (0, 1))
    mean = (answers * apart["answers"] + captions * apart["captions"]) / (answers + captions)
    torch.testing.assert_close(mean, whole["words"], rtol=1e-4, atol=1e-4)
    assert silent["answers"] == 0
    found = likelihood([model], [batch])
    assert {"captions": found.captions, "answers": found.answers} == pytest.approx(
        {name: float(value) for name, value in apart.items()}, rel=1e-4
    )


def test_a_student_that_says_what_its_teachers_say_has_nothing_to_learn(tokenizer):
    import torch

    from edge_rsvlm.export.default.model.decoder import DecoderConfig
    from edge_rsvlm.export.default.model.language import TOKEN_CHANNELS, Language
    from edge_rsvlm.export.default.stages.language import Teachers, loss, next_logits, padded, together

    torch.manual_seed(0)
    first, second, student = (Language(DecoderConfig(tokenizer.get_vocab_size(), dropout=0.0)).eval() for _ in range(3))
    said = [[("<ask>many cars<answer>", "two"), ("<bos>", "two green trees")]]
    batch = padded(tokenizer, said, 3) | {"tokens": torch.randn(1, TOKEN_CHANNELS, 2, 2)}

    def steepest(teachers):
        student.zero_grad()
        loss(student, batch, 0.1, apart=False, taught=Teachers(teachers, 1.0))["words"].backward()
        return max(float(p.grad.abs().max()) for p in student.parameters())

    alone = steepest([first])
    student.load_state_dict(first.state_dict())
    assert steepest([first]) < 0.05 * min(alone, steepest([second]))
    mean = (next_logits(first, batch).softmax(dim=1) + next_logits(second, batch).softmax(dim=1)) / 2
    torch.testing.assert_close(together([first, second], batch), mean)


def test_padding_changes_no_text(tokenizer):
    import torch

    from edge_rsvlm.export.default.model.text import TextEncoder
    from edge_rsvlm.export.default.stages.match import tokens

    torch.manual_seed(0)
    model = TextEncoder(tokenizer.get_vocab_size()).eval()
    alone, beside = tokens(tokenizer, ["trees"]), tokens(tokenizer, ["trees", "many cars in a parking lot"])
    with torch.inference_mode():
        for name, vectors in model(**alone).items():
            torch.testing.assert_close(model(**beside)[name][:1], vectors, atol=1e-5, rtol=1e-4)


def test_what_is_said_of_several_images_is_true_of_all_of_them(tokenizer):
    from types import SimpleNamespace

    from edge_rsvlm.export.default.data.scenes import Scene
    from edge_rsvlm.export.default.stages.match import DEFAULTS, BatchMaker

    scenes = [
        Scene("ucm", "a", "river", ("water", "trees"), ("a river",)),
        Scene("ucm", "b", "river", ("water",), ("a river",)),
        Scene("rsicd", "c", "River", (), ("a long river",)),
    ]
    parts = tuple(SimpleNamespace(scenes=SimpleNamespace(scenes=some)) for some in (scenes[:2], scenes[2:]))
    maker = BatchMaker(SimpleNamespace(parts=parts, tokenizer=tokenizer), DEFAULTS, np.random.default_rng(0))
    holds = maker._holds([(0, 0), (0, 1), (1, 0)], [("caption", "a river"), ("label", "trees"), ("class", "river")])
    assert holds.tolist() == [[1, 1, 1], [1, 1, 1], [0, -1, 1]]
