"""Sessions, builds and stamps of TensorRT engines, with a library that runs them without a GPU."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from edge_rsvlm.bundle import load_bundle
from edge_rsvlm.config.manifest import ShapeRange
from edge_rsvlm.engines import tensorrt as session_module
from edge_rsvlm.engines import tensorrt_device
from edge_rsvlm.engines.cuda import Cuda, Gpu
from edge_rsvlm.engines.tensorrt import TensorRtSession
from edge_rsvlm.engines.tensorrt_build import free_memory, require_room
from edge_rsvlm.engines.tensorrt_device import device_of
from edge_rsvlm.errors import BudgetError, BundleError, InputError, UsageError
from edge_rsvlm.pipeline import built
from edge_rsvlm.pipeline.built import build_engines, find, sources, stamp
from edge_rsvlm.pipeline.devices import place, with_gpu_memory
from tests import tiny_bundle
from tests.fake_tensorrt import FakeCuda, FakeTensorRt

onnx = pytest.importorskip("onnx")
helper, FLOAT, HALF, INT64 = onnx.helper, 1, 10, 7
MIB = 1 << 20


def write_graph(path, batch="n"):
    """y = 2 x, h = x in half precision, t = ids as float."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["y"]),
        helper.make_node("Cast", ["x"], ["h"], to=HALF),
        helper.make_node("Cast", ["ids"], ["t"], to=FLOAT),
    ]
    ends = [("x", FLOAT, [batch, 3, "s"]), ("ids", INT64, [batch, "k"])]
    outs = [("y", FLOAT, [batch, 3, "s"]), ("h", HALF, [batch, 3, "s"]), ("t", FLOAT, [batch, "k"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(*end) for end in ends],
        [helper.make_tensor_value_info(*out) for out in outs], [helper.make_tensor("two", FLOAT, [], [2.0])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


SHAPES = {
    "x": ShapeRange(least=(1, 3, 0), usual=(1, 3, 4), most=(4, 3, 8)),
    "ids": ShapeRange(least=(1, 1), usual=(1, 4), most=(4, 8)),
}


@pytest.fixture
def cuda():
    return FakeCuda()


@pytest.fixture
def device(cuda):
    return device_of(FakeTensorRt(cuda), Cuda(cuda))


@pytest.fixture
def session(device, tmp_path):
    from edge_rsvlm.engines.tensorrt_build import BuildSettings, build

    path = write_graph(tmp_path / "g.onnx")
    plan = build(device.library, device.complaints, path, SHAPES, BuildSettings(64 * MIB)).plan
    return TensorRtSession(device, plan, "g")


def feed(n=2, s=4, start=0):
    x = np.arange(start, start + n * 3 * s, dtype=np.float32).reshape(n, 3, s)
    return {"x": x, "ids": np.arange(n * 2, dtype=np.int64).reshape(n, 2)}


def check(session, inputs):
    y, t, h = session.run(inputs, ["y", "t", "h"])
    np.testing.assert_array_equal(y, 2 * inputs["x"])
    np.testing.assert_array_equal(t, inputs["ids"].astype(np.float32))
    np.testing.assert_array_equal(h, inputs["x"].astype(np.float16).astype(np.float32))
    assert h.dtype == np.float32


def test_outputs_come_in_the_order_asked_and_are_the_callers_own(session):
    first = session.run(feed(), ["y"])[0]
    kept = first.copy()
    session.run(feed(start=50), ["y"])
    np.testing.assert_array_equal(first, kept)
    check(session, feed())


def test_buffers_are_taken_once_for_the_largest_shapes(session, cuda):
    largest = {"x": 4 * 3 * 8 * 4, "ids": 4 * 8 * 8, "y": 4 * 3 * 8 * 4, "h": 4 * 3 * 8 * 2, "t": 4 * 8 * 4}
    sizes = sorted(max(size, 256) for size in largest.values())
    assert sorted(e[1] for e in cuda.events if e[0] == "malloc_host") == sizes
    assert sorted(e[1] for e in cuda.events if e[0] == "malloc") == sorted([*sizes, 4096])
    assert session.device_bytes == 4096 + 2 * sum(sizes)
    taken = cuda.count("malloc")
    for size in (0, 8, 3):
        check(session, feed(s=size))
    assert cuda.count("malloc") == taken


def test_only_the_bytes_of_the_call_are_copied_in_one_stream(session, cuda):
    cuda.events.clear()
    check(session, feed(n=1, s=2))
    assert [e[0] for e in cuda.events] == ["h2d", "h2d", "execute", "d2h", "d2h", "d2h", "wait"]
    assert sorted(e[1] for e in cuda.events if e[0] == "h2d") == [1 * 2 * 8, 1 * 3 * 2 * 4]


def test_repeated_shapes_are_recorded_once_and_launched(session, cuda):
    cuda.events.clear()
    for start in range(5):
        check(session, feed(start=start))
    assert (cuda.count("instantiate"), cuda.count("launch"), cuda.count("execute")) == (1, 3, 2)
    assert next(e for e in cuda.events if e[0] == "instantiate")[1] == 6  # copies are in the graph


def test_growing_shapes_are_never_recorded(session, cuda):
    cuda.events.clear()
    for size in (1, 2, 3, 4, 5):
        check(session, feed(s=size))
    for size in (1, 2, 3, 4, 5):
        check(session, feed(s=size))
    assert cuda.count("instantiate") == cuda.count("launch") == cuda.count("context") == 0


def test_a_recorded_graph_survives_other_shapes_in_between(session, cuda):
    for start in range(3):
        check(session, feed(start=start))
    check(session, feed(n=3))
    launches = cuda.count("launch")
    check(session, feed(start=90))
    assert cuda.count("launch") == launches + 1


def test_few_graphs_are_kept(session, cuda):
    for size in range(1, 8):
        for _ in range(3):
            check(session, feed(s=size))
    assert cuda.count("instantiate") == 7
    assert cuda.count("forget") == 7 - session_module.MOST_GRAPHS


def test_what_cannot_be_recorded_runs_plainly(session, cuda):
    cuda.capturable = False
    for start in range(4):
        check(session, feed(start=start))
    assert cuda.count("launch") == 0 and cuda.captured is None


def test_larger_batches_go_in_pieces(session, cuda):
    cuda.events.clear()
    check(session, feed(n=9))
    assert [e[1][0][0] for e in cuda.events if e[0] == "execute"] == [4, 4, 1]


def test_other_axes_are_never_cut(device, tmp_path):
    """With a batch of one, the first axis that varies is that of the words."""
    from edge_rsvlm.engines.tensorrt_build import BuildSettings, build

    path = write_graph(tmp_path / "g.onnx", batch=1)
    spans = {
        "x": ShapeRange(least=(1, 3, 1), usual=(1, 3, 4), most=(1, 3, 8)),
        "ids": ShapeRange(least=(1, 1), usual=(1, 4), most=(1, 8)),
    }
    plan = build(device.library, device.complaints, path, spans, BuildSettings(64 * MIB)).plan
    session = TensorRtSession(device, plan, "g")
    with pytest.raises(InputError, match=r"x of g is \(1, 3, 9\)"):
        session.run({"x": np.zeros((1, 3, 9), np.float32), "ids": np.zeros((1, 9), np.int64)}, ["y"])


def test_wrong_inputs_are_told(session):
    with pytest.raises(InputError, match=r"x of g is \(2, 3, 9\), its engine takes \(1, 3, 0\) to \(4, 3, 8\)"):
        session.run(feed(s=9), ["y"])
    with pytest.raises(UsageError, match=r"has no lora\.A; adapters need the CPU"):
        session.run(feed() | {"lora.A": np.zeros(1)}, ["y"])
    with pytest.raises(BundleError, match="was not given ids"):
        session.run({"x": feed()["x"]}, ["y"])


def test_what_fails_on_the_gpu_is_told(session, cuda):
    cuda.failing = 700
    with pytest.raises(BundleError, match=r"the GPU failed \(cudaStreamSynchronize: 700\); build the engines again"):
        session.run(feed(), ["y"])


def test_close_gives_everything_back(session, cuda):
    for start in range(3):
        check(session, feed(start=start))
    session.close()
    assert not cuda.blocks and cuda.count("forget") == 1


def test_memory_that_is_not_there(device, cuda, tmp_path):
    plan = json.dumps({"path": str(write_graph(tmp_path / "g.onnx")), "shapes": {
        name: [span.least, span.usual, span.most] for name, span in SHAPES.items()
    }}).encode()  # fmt: skip
    cuda.free = 5000
    with pytest.raises(BudgetError, match="the GPU gives no block of"):
        TensorRtSession(device, plan, "g")


def test_broken_engine(device):
    with pytest.raises(BundleError, match="cannot load the engine of g: magic tag does not match"):
        TensorRtSession(device, b"{", "g")


def test_orders_that_tensorrt_refuses(device, cuda, tmp_path):
    from edge_rsvlm.engines.tensorrt_build import BuildSettings, build

    path = write_graph(tmp_path / "g.onnx")
    refusing = FakeTensorRt(cuda, refuses="no converter")
    for library, shapes, settings, message in (
        (refusing, SHAPES, BuildSettings(64 * MIB), "cannot read g.onnx: NonZero node_3: no converter"),
        (device.library, {}, BuildSettings(64 * MIB), "no shapes for 'x'"),
        (device.library, SHAPES, BuildSettings(1), "cannot build g.onnx: no tactic fits the workspace"),
    ):
        with pytest.raises(BundleError, match=message):
            build(library, device.complaints, path, shapes, settings)


def test_free_memory_of_a_jetson_is_that_of_linux(device, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 7802000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n")
    assert free_memory(device.cuda, Gpu("Orin", "8.7", integrated=True), tmp_path) == 5000 << 10
    assert free_memory(device.cuda, device.gpu) == device.cuda.free_bytes()


def test_builds_that_do_not_fit_are_refused_with_the_numbers(device, cuda):
    cuda.largest = 8 * MIB
    require_room(device.cuda, 400 * MIB, "image", 100 * MIB, 8 * MIB)
    assert not cuda.blocks  # what was tried is given back
    with pytest.raises(BudgetError, match=r"about 400 MiB \(4 times its 100 MiB of weights\), and 399 MiB are free"):
        require_room(device.cuda, 399 * MIB, "image", 100 * MIB, 8 * MIB)
    with pytest.raises(BudgetError, match=r"takes 9.0 MiB in one piece .* no such piece of 400 MiB that are free"):
        require_room(device.cuda, 400 * MIB, "image", 100 * MIB, 9 * MIB)


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """Its graph ``main`` is there for TensorRT too, ``second`` is not."""
    monkeypatch.setenv("EDGE_RSVLM_HOME", str(tmp_path / "home"))
    files = tiny_bundle.files(main_tensorrt_onnx=tiny_bundle.model())
    ends = {"inputs": {"tiles": "x"}, "outputs": {"features": "y"}, "precision": "f32"}
    span = {"least": [1, 4], "usual": [1, 4], "most": [1, 4]}
    graphs = {
        "main": {"file": "main.onnx", **ends, "tensorrt": {"file": "main.tensorrt.onnx", "shapes": {"x": span}}},
        "second": {"file": "weights/second.onnx", **ends},
    }
    return load_bundle(tiny_bundle.write(tmp_path / "bundle", files, graphs=graphs), allow_unsigned=True)


def build_all(bundle, device):
    return build_engines(bundle, device, None, lambda name: None)


def test_engines_are_built_once_and_stamped(bundle, device):
    (engine,) = build_all(bundle, device)
    assert engine.built and engine.plan.parent.name == bundle.manifest_sha256
    facts = json.loads(engine.plan.with_suffix(".json").read_text())["for"]
    assert facts == {
        "gpu": "Fake GPU", "compute_capability": "8.7", "tensorrt": "tensorrt 10.3.0", "l4t": built.system(),
        "graph_sha256": sources(bundle)[0].sha256,
        "shapes": {"x": {"least": [1, 4], "usual": [1, 4], "most": [1, 4]}},
    }  # fmt: skip
    assert [e.built for e in build_all(bundle, device)] == [False]
    assert len(device.library.builds) == 1


def test_engines_of_another_machine_are_built_again(bundle, device, cuda):
    build_all(bundle, device)
    (source,) = sources(bundle)
    for other in (
        dataclasses.replace(device, gpu=dataclasses.replace(device.gpu, name="Other")),
        dataclasses.replace(device, gpu=dataclasses.replace(device.gpu, compute_capability="8.6")),
        device_of(FakeTensorRt(cuda, "10.16.2"), device.cuda),
    ):
        assert stamp(other, source) != stamp(device, source)
        assert find(bundle, other, source) is None
    assert find(bundle, device, dataclasses.replace(source, shapes={})) is None


def test_jetpack_is_part_of_the_stamp(bundle, device, tmp_path, monkeypatch):
    build_all(bundle, device)
    release = tmp_path / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    monkeypatch.setattr(built, "RELEASE", release)
    assert built.system() == "36.4.3"
    assert find(bundle, device, sources(bundle)[0]) is None


def test_damaged_engines_are_built_again(bundle, device):
    (engine,) = build_all(bundle, device)
    whole = engine.plan.read_bytes()
    for damage in (whole[:-1], whole[:-1] + b"]"):
        engine.plan.write_bytes(damage)
        assert find(bundle, device, sources(bundle)[0]) is None
        assert [e.built for e in build_all(bundle, device)] == [True]
    engine.plan.with_suffix(".json").write_text("{")
    assert [e.built for e in build_all(bundle, device)] == [True]


def test_an_engine_that_does_not_open_is_not_kept(bundle, device, monkeypatch):
    def refuse(*_):
        raise BundleError("it does not open", fix="none")

    monkeypatch.setattr(built, "TensorRtSession", refuse)
    with pytest.raises(BundleError, match="does not open"):
        build_all(bundle, device)
    assert not list(built.engines_folder(bundle).glob("*.plan"))


def test_timings_make_the_next_build_faster(bundle, device):
    build_all(bundle, device)
    shutil.rmtree(built.engines_folder(bundle))
    build_all(bundle, device)
    assert device.library.timing_caches == [b"", b"timings"]


@pytest.mark.parametrize(("lacking", "message"), [("free", "takes about"), ("largest", "in one piece")])
def test_a_build_without_room_never_starts(bundle, device, cuda, lacking, message):
    setattr(cuda, lacking, 100)
    with pytest.raises(BudgetError, match=f"building main {message}|building main takes .* {message}"):
        build_all(bundle, device)
    assert not device.library.builds


def test_a_profile_bounds_a_build(bundle, device):
    (source,) = sources(bundle)
    needed = 4 * source.parameter_bytes
    with pytest.raises(BudgetError, match="building main takes about"):
        build_engines(bundle, device, needed - 1, lambda name: None)


@pytest.fixture
def here(device, monkeypatch):
    monkeypatch.setattr(tensorrt_device, "open_device", lambda: device)
    return device


def test_auto_is_the_gpu_once_engines_are_built(bundle, here):
    assert (place(bundle, "auto").device, place(bundle, "auto").note) == ("cpu", "")
    with pytest.raises(UsageError, match="no engines of this GPU and TensorRT for main"):
        place(bundle, "gpu")
    build_all(bundle, here)
    found = place(bundle, "auto")
    assert (found.device, found.note) == ("gpu", "runs on Fake GPU; on the CPU: second")
    assert place(bundle, "cpu").device == "cpu"


def test_auto_says_why_it_is_the_cpu(bundle, here, monkeypatch):
    build_all(bundle, here)
    other = dataclasses.replace(here, gpu=dataclasses.replace(here.gpu, name="Other"))
    monkeypatch.setattr(tensorrt_device, "open_device", lambda: other)
    found = place(bundle, "auto")
    assert found.device == "cpu"
    assert found.note.startswith("runs on the CPU: no engines of this GPU and TensorRT for main")


@pytest.mark.parametrize("count", [(100, None), (0, 0), RuntimeError("no libcuda")], ids=["error", "none", "raises"])
def test_machines_without_a_gpu_are_told_so(count, bundle, device, monkeypatch):
    """As cuda-bindings of CUDA 13 and of CUDA 12 say it."""

    def counted():
        if isinstance(count, Exception):
            raise count
        return count

    runtime = SimpleNamespace(cudaGetDeviceCount=counted)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    monkeypatch.setattr(tensorrt_device, "load_tensorrt", lambda: device.library)
    with pytest.raises(UsageError, match="CUDA finds no GPU here"):
        place(bundle, "gpu")
    assert place(bundle, "auto").device == "cpu"


def test_a_gpu_that_does_not_answer_is_told(bundle, device, cuda, monkeypatch):
    monkeypatch.setattr(cuda, "cudaStreamCreateWithFlags", lambda flags: (999, None))
    monkeypatch.setattr(tensorrt_device, "load_tensorrt", lambda: device.library)
    monkeypatch.setattr(tensorrt_device, "load_cuda", lambda: cuda)
    with pytest.raises(UsageError, match="the GPU does not answer"):
        place(bundle, "gpu")


def test_adapters_run_on_the_cpu(bundle, here):
    build_all(bundle, here)
    with pytest.raises(UsageError, match="know nothing of the adapter 'harbour'; run with --device cpu"):
        place(bundle, "gpu", "harbour")
    found = place(bundle, "auto", "harbour")
    assert found.device == "cpu" and "adapter 'harbour'" in found.note


def test_the_gpu_engine_opens_engines_and_leaves_the_rest_to_onnxruntime(bundle, here):
    build_all(bundle, here)
    engine = place(bundle, "gpu").engine(1, 0)
    on_gpu, on_cpu = (engine.open(bundle.path(graph.file)) for graph in bundle.manifest.graphs.values())
    assert isinstance(on_gpu, TensorRtSession) and not isinstance(on_cpu, TensorRtSession)
    for session in (on_gpu, on_cpu):
        np.testing.assert_array_equal(
            session.run({"x": tiny_bundle.GOLDEN}, ["y"])[0], tiny_bundle.GOLDEN * tiny_bundle.WEIGHTS
        )


def test_the_plan_counts_the_memory_of_engines(bundle):
    before, after = bundle.manifest.tasks, with_gpu_memory(bundle, {"main": 1000}).manifest.tasks
    assert after.ask.memory.session_bytes == 1000  # all of it is one engine
    assert after.change.memory.session_bytes == before.change.memory.session_bytes + 1000  # its head stays behind


def test_commands(bundle, here, monkeypatch):
    from edge_rsvlm.cli import cli

    run = CliRunner().invoke(cli, ["engine", "build", str(bundle.folder), "--allow-unsigned", "--json"])
    assert run.exit_code == 0, run.output
    (engine,) = json.loads(run.stdout)
    assert (engine["name"], engine["built"]) == ("main", True) and engine["resident_bytes"] > 0
    again = CliRunner().invoke(cli, ["engine", "build", str(bundle.folder), "--allow-unsigned"])
    assert "main  is there" in again.stdout


def refused(*arguments):
    """Exit code and message of a command that fails."""
    program = [sys.executable, "-c", "from edge_rsvlm.cli import main; main()"]
    run = subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True)
    return run.returncode, run.stderr


def test_commands_without_a_gpu(bundle, tmp_path):
    """In processes of their own, as users run them: this machine has no GPU, or TensorRT is not installed."""
    if shutil.which("nvidia-smi"):
        pytest.skip("needs a machine without a GPU")
    given = ("--allow-unsigned",)
    for command in (
        ("engine", "build", bundle.folder, *given),
        ("caption", tmp_path / "none.tif", "--bundle", bundle.folder, "--device", "gpu", *given),
    ):
        code, said = refused(*command)
        assert code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1


def test_a_bundle_without_graphs_for_tensorrt_is_told_so(tmp_path):
    plain = load_bundle(tiny_bundle.write(tmp_path / "plain"), allow_unsigned=True)
    with pytest.raises(UsageError, match="has no graphs for TensorRT"):
        sources(plain)
    with pytest.raises(UsageError, match="has no graphs for TensorRT"):
        place(plain, "gpu")
    assert place(plain, "auto").device == "cpu"
