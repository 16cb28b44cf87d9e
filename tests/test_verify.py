"""`verify` lists every problem at once, and replays the golden probe."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from click.testing import CliRunner

import edge_rsvlm.cli
from edge_rsvlm.bundle import Rules, load_bundle, pack
from edge_rsvlm.bundle.signatures import new_key, trust
from edge_rsvlm.bundle.signing import sign_bundle
from edge_rsvlm.engines.fake import FakeSession
from edge_rsvlm.errors import BundleError, EdgeRsvlmError
from edge_rsvlm.verify import cpu_graph, difference, verify
from tests import llama_bundles, tiny_bundle
from tests.tiny_bundle import GOLDEN, WEIGHTS, model, npz, tensor

ALLOWED = Rules(allow_unsigned=True)


@pytest.fixture
def run():
    """Runs `edge-rsvlm verify ...`; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        done = CliRunner().invoke(edge_rsvlm.cli.cli, ["verify", *map(str, arguments)])
        if isinstance(done.exception, EdgeRsvlmError):
            return done.exception.exit_code, "", str(done.exception)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    return call


def kinds(report):
    return [(problem.kind, problem.file) for problem in report.problems]


def test_a_whole_bundle_passes_as_folder_and_as_file(run, tmp_path):
    new_key("ours")
    trust("ours")
    folder = sign_bundle(tiny_bundle.write(tmp_path / "b"), "ours")
    pack(folder, tmp_path / "b.ersvlm")
    for path in (folder, tmp_path / "b.ersvlm"):
        code, out, err = run("--bundle", path)
        assert (code, err) == (0, "")
        assert out.startswith("tiny version 3, trusted by ours, 6 files\n")
        assert "ok  main: y: 0.00e+00" in out and "ok  second: y: 0.00e+00" in out
        record = json.loads(run("--bundle", path, "--json")[1])
        assert record["passed"] and record["problems"] == [] and record["trusted_by"] == "ours"
        assert [check["graph"] for check in record["probe"]] == ["main", "second"]


def test_everything_wrong_is_listed_at_once(run, tmp_path):
    contents = tiny_bundle.files() | {
        "a/objects.npz": npz(a=np.array([None], dtype=object)),
        "a/graph.onnx": model(tensor("w", {"location": "../../secret"})),
        "short.txt": b"12",
        "gone.txt": b"",
    }
    folder = tiny_bundle.write(tmp_path / "b", contents)
    (folder / "gone.txt").unlink()
    (folder / "short.txt").write_bytes(b"1")
    (folder / "answers.txt").write_bytes(b"no\nyes\n")
    (folder / "extra.bin").write_bytes(pickle.dumps({"a": 1}))
    (folder / "link").symlink_to("/etc")
    report = verify(folder, Rules())
    assert sorted(kinds(report)) == [
        ("external_data", "a/graph.onnx"),
        ("hash", "answers.txt"),
        ("missing", "gone.txt"),
        ("pickle", "a/objects.npz"),
        ("pickle", "extra.bin"),
        ("signature", ""),
        ("size", "short.txt"),
        ("symlink", "link"),
        ("unlisted", "extra.bin"),
    ]
    assert report.probe == ()
    code, out, err = run("--bundle", folder)
    assert code == 5 and out.count("WRONG") == 9 and "9 problems" in err
    assert all(problem.fix and "/" not in problem.kind for problem in report.problems)
    assert [p["kind"] for p in json.loads(run("--bundle", folder, "--json")[1])["problems"]] == [
        p.kind for p in report.problems
    ]


def test_a_wrong_manifest_does_not_hide_wrong_files(tmp_path):
    data = tiny_bundle.manifest(tiny_bundle.files())
    data["licens"] = data.pop("licence")
    del data["tasks"]["detect"]["text"]
    folder = tiny_bundle.write(tmp_path / "b")
    (folder / "manifest.json").write_text(json.dumps(data))
    (folder / "answers.txt").write_bytes(b"no\nyes\n")
    report = verify(folder, ALLOWED)
    assert kinds(report) == [("schema", "manifest.json")] * 3 + [("hash", "answers.txt")]
    assert any("did you mean 'licence'" in problem.fix for problem in report.problems)


def test_a_wrong_file_is_searched_as_far_as_it_goes(tmp_path):
    folder = tiny_bundle.write(tmp_path / "b")
    path = tmp_path / "b.ersvlm"
    pack(folder, path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"yes\nno\n", b"no\nyes\n"))
    # The zip's own checksum stops it before its end.
    assert kinds(verify(path, Rules())) == [("seal", ""), ("signature", ""), ("size", "answers.txt")]
    with pytest.raises(BundleError, match="altered after it was packed"):
        load_bundle(path, allow_unsigned=True)


def test_verify_accepts_nothing(tmp_path, home):
    assert verify(tiny_bundle.write(tmp_path / "new", version=9), ALLOWED).passed
    load_bundle(tiny_bundle.write(tmp_path / "old", version=2), allow_unsigned=True)
    load_bundle(tmp_path / "new", allow_unsigned=True)
    assert kinds(verify(tmp_path / "old", ALLOWED)) == [("rollback", "")]
    assert verify(tmp_path / "old", Rules(allow_unsigned=True, allow_older=True)).passed


def test_allow_older_reaches_the_command(run, tmp_path):
    for version in (2, 1):
        tiny_bundle.write(tmp_path / f"v{version}", version=version)
    load_bundle(tmp_path / "v2", allow_unsigned=True)
    assert run("--bundle", tmp_path / "v1", "--allow-unsigned")[0] == 5
    assert run("--bundle", tmp_path / "v1", "--allow-unsigned", "--allow-older")[0] == 0


def test_no_bundle_at_all(run, tmp_path):
    code, _, err = run("--bundle", tmp_path)
    assert code == 5 and "name a folder or a file that holds a bundle" in err


@pytest.mark.parametrize(
    ("golden", "message"),
    [
        (npz(**{"in.x": GOLDEN, "out.y": GOLDEN * WEIGHTS * 1.01}), r"gives another 'y' here: off by 9.90e-03"),
        (npz(**{"in.x": GOLDEN, "out.y": GOLDEN[0] * WEIGHTS}), "off by inf"),
        (npz(**{"in.x": GOLDEN, "out.y": GOLDEN * np.nan}), "off by inf"),
        (npz(**{"in.x": GOLDEN, "out.z": GOLDEN}), "main.onnx failed"),
        (npz(**{"in.z": GOLDEN, "out.y": GOLDEN}), "main.onnx failed"),
        (npz(**{"in.x": GOLDEN.astype(np.int64), "out.y": GOLDEN}), "main.onnx failed"),
        (npz(**{"in.x": GOLDEN}), "is no golden probe"),
        (npz(**{"in.x": GOLDEN, "out.y": GOLDEN, "y": GOLDEN}), "is no golden probe"),
        (b"not a zip", "no .npz that can be read"),
    ],
)
def test_probes_that_fail(run, tmp_path, golden, message):
    folder = tiny_bundle.write(tmp_path / "b", tiny_bundle.files(probe_npz=golden))
    report = verify(folder, ALLOWED)
    assert [problem.kind for problem in report.problems] == ["probe", "probe"]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(str(report.problems[0]))
    assert run("--bundle", folder, "--allow-unsigned")[0] == 5
    json.loads(run("--bundle", folder, "--allow-unsigned", "--json")[1], parse_constant=pytest.fail)


def test_a_probe_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_rsvlm.verify.MOST_PROBE_BYTES", 100)
    assert "would unpack to" in str(verify(tiny_bundle.write(tmp_path / "b"), ALLOWED).problems[0])


def test_one_failing_graph_does_not_hide_another(tmp_path):
    folder = tiny_bundle.write(tmp_path / "b")

    def open_graph(path):
        factor = 2 if path.name == "main.onnx" else 1
        return FakeSession(lambda inputs: {"y": inputs["x"] * WEIGHTS * factor})

    report = verify(folder, ALLOWED, open_graph)
    assert [result.passed for result in report.probe] == [False, True]
    assert [problem.kind for problem in report.problems] == ["probe"]


def test_graphs_without_a_probe_are_named(run, tmp_path):
    folder = tiny_bundle.write(tmp_path / "b", probe=[])
    code, out, _ = run("--bundle", folder, "--allow-unsigned")
    assert code == 0 and "not run  main" in out and "not run  second" in out


def test_the_tiny_graph_is_real(tmp_path):
    folder = tiny_bundle.write(tmp_path / "b")
    for name in ("main.onnx", "weights/second.onnx"):
        (found,) = cpu_graph(folder / name).run({"x": GOLDEN}, ["y"])
        np.testing.assert_array_equal(found, GOLDEN * WEIGHTS)


def test_difference():
    inf, nan = float("inf"), float("nan")
    for actual, expected, wanted in [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0, 0.1], [0.0, 0.0], 0.1),
        ([], [], 0.0),
        ([nan, inf], [nan, inf], 0.0),
        ([nan], [1.0], inf),
        ([1.0], [nan], inf),
        ([-inf], [inf], inf),
        ([True, False], [True, True], 1.0),
        (["a", "b"], ["a", "b"], 0.0),
        (["a", "c"], ["a", "b"], inf),
        (["1.0"], [1.0], inf),
        ([[1.0]], [1.0], inf),
        ([2**60], [2**60 + 2**30], 2**-30),
    ]:
        assert difference(np.array(actual), np.array(expected)) == pytest.approx(wanted, abs=1e-12), (actual, expected)


@pytest.fixture(params=["alone", "hybrid"])
def by_llama(request, tmp_path, needs):
    """A bundle whose words llama.cpp writes."""
    for name in ("llama_cpp", "gguf", "onnx"):
        needs(name)
    return getattr(llama_bundles, request.param)(tmp_path / "b")


def test_what_llama_does_is_replayed(run, by_llama):
    code, out, _ = run("--bundle", by_llama, "--allow-unsigned")
    assert code == 0 and "ok  task ask: logits: 0.00e+00" in out


def test_another_language_model_is_detected(run, by_llama):
    llama_bundles.write_model(by_llama, 400, seed=9)
    assert kinds(verify(by_llama, ALLOWED)) == [("hash", llama_bundles.MODEL)]
    code, out, _ = run("--bundle", llama_bundles.hashed(by_llama), "--allow-unsigned")
    assert code == 5 and "'task ask' gives another 'logits' here" in out


def test_another_projector_is_detected(tmp_path, needs):
    needs("llama_cpp")
    needs("gguf")
    folder = llama_bundles.alone(tmp_path / "b")
    llama_bundles.tiny_gguf.write_projector(folder / llama_bundles.PROJECTOR, seed=7)
    (problem,) = verify(llama_bundles.hashed(folder), ALLOWED).problems
    assert problem.kind == "probe" and "'task ask' gives another 'logits'" in str(problem)


def test_probes_of_llama_that_cannot_be_replayed(by_llama):
    with np.load(by_llama / llama_bundles.PROBE) as stored:
        arrays = {name: stored[name] for name in stored.files if name != "in.answer"}
    (by_llama / llama_bundles.PROBE).write_bytes(npz(**arrays))
    (problem,) = verify(llama_bundles.hashed(by_llama), ALLOWED).problems
    assert problem.kind == "probe" and "lacks the array in.answer" in str(problem)


def test_a_model_of_llama_that_is_broken(by_llama):
    path = by_llama / llama_bundles.MODEL
    path.write_bytes(path.read_bytes()[:-500])
    (problem,) = verify(llama_bundles.hashed(by_llama), ALLOWED).problems
    assert problem.kind == "probe" and "cannot load model.gguf" in str(problem)


def test_a_probe_of_a_task_that_llama_does_not_do(tmp_path):
    case = {"task": "ask", "file": "probe.npz", "tolerance": 0.1}
    golden = npz(**{"in.answer": np.array([1]), "out.logits": GOLDEN})
    report = verify(tiny_bundle.write(tmp_path / "b", tiny_bundle.files(probe_npz=golden), probe=[case]), ALLOWED)
    assert "which llama.cpp does not do" in str(report.problems[0])
