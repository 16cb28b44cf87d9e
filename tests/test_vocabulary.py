"""Words that a bundle learnt, and texts that are refused for others."""

from __future__ import annotations

import pytest

from edge_rsvlm.bundle import Rules
from edge_rsvlm.errors import BundleError, UsageError
from edge_rsvlm.tasks.vocabulary import check_words, read_vocabulary, words
from edge_rsvlm.verify import verify
from tests import tiny_bundle
from tests.bundle_checks import refused


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("airplane\nbridge\nthe\nété\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    ["airplane", "The 3 AIRPLANE", "the-bridge, 12!", "", "42", "e\u0301te\u0301"],
)
def test_known_words_pass_in_any_case_with_digits_and_punctuation(vocabulary, text):
    check_words([text], vocabulary, examples=True)


def test_any_word_will_do_without_a_vocabulary():
    check_words(["zeppelin"], None, examples=True)


def test_unknown_words_are_named_with_the_nearest(vocabulary):
    with pytest.raises(UsageError) as caught:
        check_words(["the airplan", "Quux bridge"], vocabulary, examples=True)
    text = str(caught.value)
    assert "'airplan', 'quux'" in text and "nearest that it knows: airplane" in text
    assert "detect --like IMAGE#x,y,w,h" in text and "'the'" not in text and "'bridge'" not in text
    with pytest.raises(UsageError) as caught:
        check_words(["quux"], vocabulary, examples=False)
    assert "--like" not in str(caught.value) and "other words" in str(caught.value)


def test_words_are_runs_of_letters():
    assert words("Two B-52s, l'été_42") == ["two", "b", "s", "l", "été"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"Airplane\n", b"two words\n", b"airplane\n\nbridge\n", b"b52\n", b" airplane\n"]
)
def test_a_file_that_is_no_vocabulary(tmp_path, content):
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"words\.txt"):
        read_vocabulary(path)


def tiny(folder, content, verb="detect"):
    """A bundle whose task takes the words of a file; None: the file is not there."""
    tasks = tiny_bundle.manifest({})["tasks"]
    if verb == "caption":
        tasks[verb] |= {"vocabulary": "words.txt"}
    else:
        tasks[verb] |= {"text": tasks[verb]["text"] | {"vocabulary": "words.txt"}}
    contents = tiny_bundle.files() | ({} if content is None else {"words.txt": content})
    return tiny_bundle.write(folder, contents, tasks=tasks)


@pytest.mark.parametrize("verb", ["detect", "classify", "caption"])
def test_verify_reads_the_vocabularies_of_a_bundle(tmp_path, verb):
    assert verify(tiny(tmp_path / "good", b"airplane\nbridge\n", verb), Rules(allow_unsigned=True)).passed
    for name, content in {"none": b"", "upper": b"Airplane\n", "binary": b"\xff\xfe"}.items():
        report = verify(tiny(tmp_path / name, content, verb), Rules(allow_unsigned=True))
        assert [(p.kind, p.file) for p in report.problems] == [("vocabulary", "words.txt")]
    refused(tiny(tmp_path / "missing", None, verb), "refers to a file 'words.txt' that it does not list")
