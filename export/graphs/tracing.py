"""A transformers model -> an ONNX graph without weights, in the memory of a small model.

Parameters are fake tensors, so that a model of any size traces in seconds; what the config alone determines (rotary
frequencies, position ids) has its values. The graph's weights stay open, each with the name of the parameter or buffer
that belongs there, and ``external_data.write`` fills them.
"""

from __future__ import annotations

import ast
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import nn
from torch._dynamo.exc import UserError
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from edge_rsvlm.errors import UsageError
from edge_rsvlm.export.checkpoint.skeleton import skeleton
from edge_rsvlm.export.families.base import GraphInput, GraphPlan
from edge_rsvlm.export.graphs.passes import fold_transposes, simplify, strip_notes, values_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OPSET = 20  # the newest that TensorRT 10 reads
DYNAMIC = torch.export.Dim.DYNAMIC
SCOPES = "pkg.torch.onnx.name_scopes"
FIX_AXIS = "give that axis a number in the plan, or change the wrapper so that it stays free"


@dataclass(frozen=True)
class Weight:
    """What belongs into an initialiser: a name of the state dict, and whether its two axes are swapped."""

    parameter: str
    transposed: bool = False


@dataclass(frozen=True)
class Traced:
    """A graph whose ``weights`` (by initialiser name) have shapes and dtypes, but no values."""

    name: str
    model: ir.Model
    weights: Mapping[str, Weight]
    layers: Mapping[str, str]
    """Modules of the transformers model, in the order in which they finish, and the value that is their output."""


def trace(model_class: type[nn.Module], config: PretrainedConfig, plan: GraphPlan) -> Traced:
    """Trace one graph. UsageError when a dynamic size of the plan became a constant, or a weight has no name."""
    model = skeleton(model_class, config)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _fake_parameters(model, mode)
    module = plan.wrap(model).eval()
    with mode:
        example = tuple(_example(spec, plan.sizes) for spec in plan.inputs)
    with torch.no_grad(), _quiet_exporter():
        exported = _export(module, example, plan)
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False, external_data=False,
            input_names=[spec.name for spec in plan.inputs], output_names=list(plan.outputs),
        )  # fmt: skip
    assert program is not None
    parameters = _parameter_names(module, model)
    graph = program.model.graph
    weights = _open_weights(graph, parameters, plan)
    simplify(program.model, weights)
    transposed = fold_transposes(graph, weights.values())
    _name_axes(graph, plan)
    layers = _layer_outputs(graph, _module_names(module, model))
    strip_notes(program.model)
    for name in [name for name, value in weights.items() if not value.uses()]:
        del graph.initializers[name], weights[name]
    named = {name: Weight(name, value in transposed) for name, value in weights.items()}
    return Traced(plan.name, program.model, named, layers)


def _fake_parameters(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace parameters by fake ones on the CPU; tied ones stay tied."""
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                with mode:
                    data = torch.empty(parameter.shape, dtype=parameter.dtype)
                fakes[id(parameter)] = nn.Parameter(data, requires_grad=False)
            module._parameters[name] = fakes[id(parameter)]


def _example(spec: GraphInput, sizes: Mapping[str, int]) -> torch.Tensor:
    # One tensor per input: the exporter takes a tensor given twice for one input.
    return torch.empty([sizes[size] if isinstance(size, str) else size for size in spec.shape], dtype=spec.dtype)


def _export(module: nn.Module, example: tuple[torch.Tensor, ...], plan: GraphPlan) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, example, dynamic_shapes=_dynamic_shapes(module, plan.inputs))
    except UserError as error:
        # Of the exporter's pages only the line that tells the input and axis.
        reason = next((line for line in str(error).splitlines() if "You marked" in line), str(error).splitlines()[0])
        raise UsageError(f"graph '{plan.name}' does not trace: {reason.strip(' -')}", fix=FIX_AXIS) from error


def _dynamic_shapes(module: nn.Module, inputs: tuple[GraphInput, ...]) -> tuple[Any, ...]:
    """As ``torch.export`` wants them: what ``*args`` of ``forward`` takes is a tuple of its own."""
    shapes = [{axis: DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs]
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    fixed = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:fixed], tuple(shapes[fixed:]))


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs that operators of torchvision are absent, which no graph of ours has, and copies old types."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _parameter_names(module: nn.Module, model: nn.Module) -> dict[str, str]:
    """Names inside the wrapper -> names of the transformers model's state dict, by identity."""
    stored = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    for name, tensor in stored.items():
        names.setdefault(id(tensor), name)
    inside = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: names[id(tensor)] for name, tensor in inside if id(tensor) in names}


def _open_weights(graph: ir.Graph, parameters: Mapping[str, str], plan: GraphPlan) -> dict[str, ir.Value]:
    """Take the (empty) tensors out of the initialisers that are weights, and give them the parameters' names."""
    weights: dict[str, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        parameter = parameters.get(name)
        if parameter is None:
            if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
                raise UsageError(
                    f"graph '{plan.name}': '{name}' is computed from weights before the graph starts",
                    fix="compute it in forward(), from parameters of the transformers model",
                )
            continue
        del graph.initializers[name]
        if parameter in weights:
            ir.convenience.replace_all_uses_with(value, weights[parameter])
            continue
        value.const_value = None
        value.name = parameter
        graph.initializers[parameter] = value
        weights[parameter] = value
    return weights


def _name_axes(graph: ir.Graph, plan: GraphPlan) -> None:
    """Give the exporter's symbols (s10, s29) the plan's names, also where they are part of a sum."""
    names: dict[str, str] = {}
    for value, spec in zip(graph.inputs, plan.inputs, strict=True):
        for size, wanted in zip(value.shape or (), spec.shape, strict=True):
            if not isinstance(wanted, str):
                continue
            if isinstance(size, int) or names.get(str(size.value), wanted) != wanted:
                raise UsageError(
                    f"graph '{plan.name}': '{wanted}' of '{spec.name}' became {size}, which the model fixes",
                    fix=FIX_AXIS,
                )
            names[str(size.value)] = wanted
    for value in values_of(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int):
        return size
    if size.value is None:
        return None
    return re.sub(r"\w+", lambda match: names.get(match.group(), match.group()), str(size.value))


def _module_names(module: nn.Module, model: nn.Module) -> dict[str, str]:
    """Names inside the wrapper -> names in the transformers model, for the modules that ``layers`` lists.

    Those are the modules with parameters of their own, and the members of module lists, which are whole blocks.
    """
    names = {id(part): name for name, part in model.named_modules()}
    blocks = {id(part) for parent in model.modules() if isinstance(parent, nn.ModuleList) for part in parent}
    return {
        inside: names[id(part)]
        for inside, part in module.named_modules(remove_duplicate=False)
        if id(part) in names and (id(part) in blocks or any(p is not None for p in part._parameters.values()))
    }


def _layer_outputs(graph: ir.Graph, modules: Mapping[str, str]) -> dict[str, str]:
    """The last tensor that a module makes and something outside of it reads. A module that runs twice counts last."""
    outputs: dict[str, str] = {}
    scopes = {node: _scopes(node) for node in graph}
    for node in graph:
        value = node.outputs[0]
        if value.dtype != ir.DataType.FLOAT:
            continue  # arithmetic with sizes
        readers = [scopes.get(use.node, frozenset()) for use in value.uses()]
        # Blocks come after what is inside of them, as they finish later.
        for scope in sorted(scopes[node], key=len, reverse=True):
            if scope in modules and (value.is_graph_output() or any(scope not in reader for reader in readers)):
                outputs.pop(modules[scope], None)
                outputs[modules[scope]] = str(value.name)
    return outputs


def _scopes(node: ir.Node) -> frozenset[str]:
    """Modules around a node, by their names inside the wrapper; ``@1`` marks a second call."""
    *scopes, _ = ast.literal_eval(node.metadata_props.get(SCOPES, "['']"))
    return frozenset(scope.partition("@")[0] for scope in scopes)
