"""Which stages are computed in the pass of another: decided by the ops alone, so that bytes belong to the key.

A stage that is a TensorOp takes each model that is another TensorOp's output as that op computes it: float32, not yet
rounded. That holds whoever else uses the model and whatever the store holds, and is part of the stage's key. So adding
an eval of a stage, or asking for its files, changes no byte of the stages after it. A stage that nothing but such
stages uses is then never stored: its pass is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hubforge.op import Op, TensorOp
from hubforge.recipe import Node


def unrounded(node: Node, nodes: Mapping[str, Node]) -> dict[str, str]:
    """The refs of a step that it takes unrounded, and the full names of the steps they point to."""
    if not isinstance(node.op, TensorOp) or node.op.apart():
        return {}
    return {ref: target for ref, target in node.inputs.items() if target in nodes and not why_stored(nodes[target].op)}


def why_stored(op: Op) -> str:
    """Why an op's output must be stored before another can use it; "" when it need not."""
    if not isinstance(op, TensorOp):
        return "it is no merge of tensors"
    return op.apart() or ("" if op.fuse else "`fuse: false`")


def places(nodes: Mapping[str, Node], kept: Iterable[str]) -> dict[str, str]:
    """Why each TensorOp's output is stored, by full name; "" for one that exists only in the passes of its users.

    nodes: the steps that are wanted. kept: the full names of those whose files are asked for or published.
    """
    asked = set(kept)
    users: dict[str, list[str]] = {}
    for name, node in nodes.items():
        taken = unrounded(node, nodes)
        for ref, target in node.inputs.items():
            users.setdefault(target, []).append("" if ref in taken else name)
    found = {}
    for name, node in nodes.items():
        if isinstance(node.op, TensorOp):
            readers = [user for user in users.get(name, []) if user]
            reason = why_stored(node.op)
            if name in asked:
                reason = "its files are asked for"
            elif name not in users:
                reason = "it is the end of its chain"
            elif readers:
                others = f" and {len(readers) - 1} more" if len(readers) > 1 else ""
                reason = reason or f"{readers[0]}{others} reads its files"
            found[name] = reason
    return found
