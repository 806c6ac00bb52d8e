"""Rewrites the graph of a language model for ONNX Runtime in a browser.

There, kernels that multiply integers with integers are several times faster
than those that read blocks of 4 or 8 bits. Every constant kernel becomes int8
with a scale per output, and its inputs are rounded as they come, twice: see
README.md. Logits are computed for the last token alone, and the places
that adapters fill become inputs like others, because the runtime for browsers
takes no optional ones.
"""

import numpy as np
import onnx
from onnx import helper
from onnx import numpy_helper

MICROSOFT = "com.microsoft"
LINEAR = ("MatMul", "FusedMatMul", "MatMulNBits")
LOOKUP = ("Gather", "GatherBlockQuantized")


class Rewriter:
    """A graph, its weights loaded, that is changed in place.

    Args:
        model: The model of a folder that `to_genai` wrote.
    """

    def __init__(self, model):
        self.graph = model.graph
        self.constants = {t.name: t for t in self.graph.initializer}
        self.new = {}
        self.nodes = []
        self.made = set()

    def rewrite(self, bits=16):
        """Applies it all; returns the names of the places for adapters.

        Args:
            bits: What inputs of kernels are rounded to: 16, as the sum of
                two times 8, or 8. With `None`, kernels stay as they are.
        """
        self.bits = bits
        slots = self._open_slots()
        for node in self.graph.node:
            if node.output[0] == "logits":
                self._last_token(node)
            if bits and node.op_type in LINEAR and self._kernel(node):
                self._product(node)
            elif bits and node.op_type in LOOKUP and self._table(node):
                self._rows(node)
            else:
                self.nodes.append(node)
        if bits and not self.new.keys() - {"last"}:
            raise ValueError(
                "The model has no kernel that can become int8. Export it with "
                '`quantize` as `None`, `"int8"` or `"int4"`. Received: '
                f"constants of {len(self.constants)} names"
            )
        self._replace()
        return slots

    def _open_slots(self):
        """Places of rank 0 become required inputs, all others constants."""
        slots = {n for n, t in self.constants.items() if 0 in t.dims}
        kept = [
            i
            for i in self.graph.input
            if i.name not in self.constants or i.name in slots
        ]
        slots &= {i.name for i in kept}
        for name in slots:
            del self.constants[name]
        del self.graph.input[:]
        self.graph.input.extend(kept)
        return slots

    def _last_token(self, node):
        index = self._constant("last", np.array([-1]))
        last = f"{node.input[0]}.last"
        self._add("Gather", [node.input[0], index], last, axis=1)
        node.input[0] = last
        shape = self.graph.output[0].type.tensor_type.shape
        shape.dim[1].dim_value = 1

    # -- Kernels -------------------------------------------------------------

    def _kernel(self, node):
        return node.input[1] in self.constants

    def _table(self, node):
        """Whether it looks up rows of tokens, of a table that is ours."""
        plain = node.op_type == "Gather" and node.input[1] == "input_ids"
        return self._kernel_of(node) is not node or (
            plain and node.input[0] in self.constants
        )

    def _kernel_of(self, node):
        """The product that a tied head makes with the table, if there is."""
        for other in self.graph.node:
            if other.op_type in LINEAR and other.input[1] == node.input[0]:
                return other
        return node

    def _product(self, node):
        values, scales = self._integers(node.input[1], node)
        bias = node.input[5] if len(node.input) > 5 else ""
        x, out = node.input[0], node.output[0]
        if self.bits == 8:
            self._multiply(x, values, scales, bias, out)
            return
        self._multiply(x, values, scales, bias, f"{out}.coarse")
        self._multiply(self._left(x), values, scales, "", f"{out}.fine")
        self._add("Add", [f"{out}.coarse", f"{out}.fine"], out)

    def _multiply(self, x, values, scales, bias, out):
        inputs = [x, values, scales, "", bias]
        self._add("DynamicQuantizeMatMul", inputs, out, domain=MICROSOFT)

    def _left(self, x):
        """What 8 bits leave of `x`, which then has 8 bits of its own."""
        left = f"{x}.left"
        if left not in self.made:
            self.made.add(left)
            quantized = [f"{x}.int8", f"{x}.scale", f"{x}.zero"]
            self._add("DynamicQuantizeLinear", [x], *quantized)
            self._add("DequantizeLinear", quantized, f"{x}.rounded")
            self._add("Sub", [x, f"{x}.rounded"], left)
        return left

    def _rows(self, node):
        """Columns of the head: `[hidden, batch, tokens]`, then turned."""
        values, scales = self._integers(node.input[0], self._kernel_of(node))
        # A `Reshape` that follows rows of blocks keeps these as they are.
        ids, out = node.input[1], node.output[0]
        self._add("Gather", [values, ids], f"{out}.columns", axis=1)
        self._add(
            "Transpose", [f"{out}.columns"], f"{out}.rows", perm=[1, 2, 0]
        )
        self._add(
            "Cast", [f"{out}.rows"], f"{out}.float", to=onnx.TensorProto.FLOAT
        )
        self._add("Gather", [scales, ids], f"{out}.scale", axis=0)
        axes = self._constant("rows.axes", np.array([-1]))
        self._add("Unsqueeze", [f"{out}.scale", axes], f"{out}.scales")
        self._add("Mul", [f"{out}.float", f"{out}.scales"], out)

    def _integers(self, name, node):
        values, scales = f"{name}.int8", f"{name}.scale"
        if values not in self.new:
            kernel = self._float(name, node)
            scale = np.abs(kernel).max(axis=0) / 127
            scale[scale == 0] = 1
            self._constant(values, np.rint(kernel / scale).astype("int8"))
            self._constant(scales, scale.astype("float32"))
        return values, scales

    def _float(self, name, node):
        """The kernel of a product, `[inputs, outputs]`."""
        if node.op_type == "MatMulNBits":
            return self._from_blocks(node)
        kernel = numpy_helper.to_array(self.constants[name])
        return kernel if node.op_type == "MatMul" else kernel.T

    def _from_blocks(self, node):
        settings = {
            a.name: helper.get_attribute_value(a) for a in node.attribute
        }
        bits, size = settings["bits"], settings["block_size"]
        outputs, inputs = settings["N"], settings["K"]
        packed, scales = (
            numpy_helper.to_array(self.constants[n]) for n in node.input[1:3]
        )
        zero = 2 ** (bits - 1)
        if len(node.input) > 3 and node.input[3]:
            points = numpy_helper.to_array(self.constants[node.input[3]])
            points = unpack(points.reshape(outputs, -1), bits)
            zero = points[:, : scales.size // outputs, None].astype("float32")
        values = unpack(packed.reshape(outputs, -1), bits)
        values = values.reshape(outputs, -1, size).astype("float32")
        kernel = (values - zero) * scales.reshape(outputs, -1, 1)
        return kernel.reshape(outputs, -1)[:, :inputs].T

    # -- Writing -------------------------------------------------------------

    def _add(self, kind, inputs, *outputs, domain="", **attributes):
        node = helper.make_node(
            kind, inputs, outputs, domain=domain, **attributes
        )
        self.nodes.append(node)

    def _constant(self, name, array):
        if name not in self.new:
            self.new[name] = numpy_helper.from_array(
                np.ascontiguousarray(array), name
            )
        return name

    def _replace(self):
        """Puts the new nodes in, and leaves out what nothing reads."""
        read = {name for n in self.nodes for name in n.input}
        constants = [
            t
            for t in (*self.constants.values(), *self.new.values())
            if t.name in read
        ]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(constants)


def unpack(packed, bits):
    """Integers of 4 bits, two in a byte, or of 8."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(
        len(packed), -1
    )
