"""A graph while its layers are replaced one after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_rsvlm.export.graphs.sliced import names_read
from edge_rsvlm.export.graphs.tensor_files import initialisers
from edge_rsvlm.export.quantize.graph_files import write_graph
from edge_rsvlm.export.quantize.layers import Constants
from edge_rsvlm.export.quantize.stream import Files


class Rewriting:
    """The nodes of ``path`` that are not constant, in order, each replaced by none or several; its arrays by name.

    New arrays lie in ``folder`` until the graph is written.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.model = onnx.load(path, load_external_data=False)
        self.constants = Constants(self.model.graph)
        self.tensors: dict[str, NDArray[Any]] = dict(initialisers(path))
        self._files = Files(folder / "arrays")
        self.originals = [node for node in self.model.graph.node if not self.constants.is_made_by(node)]
        self._steps = [[node] for node in self.originals]
        self._step_of = {name: index for index, node in enumerate(self.originals) for name in node.output}

    def nodes(self, start: int = 0, stop: int | None = None) -> list[onnx.NodeProto]:
        """What there is now for the original nodes from ``start`` to before ``stop``."""
        return [node for step in self._steps[start:stop] for node in step]

    def needed_from(self, start: int) -> set[str]:
        return {name for node in self.nodes(start) for name in names_read(node)}

    def maker(self, name: str) -> onnx.NodeProto | None:
        index = self._step_of.get(name)
        return None if index is None else next((node for node in self._steps[index] if name in node.output), None)

    def readers(self, name: str) -> int:
        """How many nodes read this value, and one more where it leaves the graph."""
        nodes = sum(name in names_read(node) for node in self.nodes())
        return nodes + sum(value.name == name for value in self.model.graph.output)

    def replace(self, node: onnx.NodeProto, others: Sequence[onnx.NodeProto]) -> None:
        step = self._steps[self._step_of[node.output[0]]]
        at = next(index for index, candidate in enumerate(step) if candidate is node)
        step[at : at + 1] = others

    def insert_before(self, node: onnx.NodeProto, other: onnx.NodeProto) -> None:
        self.replace(node, [other, node])

    def add_tensor(self, name: str, array: NDArray[Any]) -> str:
        self.tensors[name] = self._files.keep(np.ascontiguousarray(array))
        self.constants.initializers.add(name)
        return name

    def add_constant(self, node: onnx.NodeProto) -> str:
        """A node that only constants go into."""
        self.constants.made[node.output[0]] = node
        return str(node.output[0])

    def write(self, path: Path) -> int:
        """Write what there is now, constant nodes where they are read first; the bytes of its arrays."""
        self._put_constants_before_use()
        return write_graph(self.model, self.tensors, path)

    def _put_constants_before_use(self) -> None:
        graph, done = self.model.graph, set[str]()
        ordered: list[onnx.NodeProto] = []
        for node in [*self.nodes(), *self._outputs_that_are_constant()]:
            before = self.constants.nodes_for([node], done)
            ordered += [*before, node]
            done |= {name for made in before for name in made.output}
        del graph.node[:]
        graph.node.extend(ordered)
        del graph.value_info[:]

    def _outputs_that_are_constant(self) -> list[onnx.NodeProto]:
        made = self.constants.made
        return list({made[v.name].output[0]: made[v.name] for v in self.model.graph.output if v.name in made}.values())
