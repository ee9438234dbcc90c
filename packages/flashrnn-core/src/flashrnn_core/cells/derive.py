"""The backward of a cell, derived from its forward: reverse mode on the straight line.

forward:  (gates, states) -> new states
backward: (gates, states, d<state>_new of each state) -> (d<gate> of each gate, d<state> of each state)

The backward computes again what it needs of the forward, from the pre-activations and the old states alone.
"""

from flashrnn_core.cells.vocabulary import OPS, Graph, Trace, Value


def cotangent_name(state: str) -> str:
    """The name of a new state's cotangent."""
    return f"d{state}_new"


def derive(forward: Graph, states: tuple[str, ...]) -> Graph:
    """The gradient graph of `forward`, whose outputs are the new `states` in order."""
    trace = Trace()
    inputs = forward.inputs + tuple(cotangent_name(s) for s in states)
    values = {name: trace.add("input", value=name) for name in inputs}
    replayed: list[Value] = []
    for node in forward.nodes:
        trace.line = node.line
        if node.op == "input":
            replayed.append(values[str(node.value)])
        else:
            replayed.append(trace.add(node.op, *[replayed[a] for a in node.args], value=node.value))

    cotangents: dict[int, Value] = {}

    def accumulate(index: int, cotangent: Value) -> None:
        cotangents[index] = cotangents[index] + cotangent if index in cotangents else cotangent

    for state, output in zip(states, forward.outputs, strict=True):
        accumulate(output, values[cotangent_name(state)])
    for index in reversed(range(len(forward.nodes))):
        node = forward.nodes[index]
        if index not in cotangents or not node.args:
            continue
        trace.line = node.line
        partials = OPS[node.op](cotangents[index], replayed[index], *[replayed[a] for a in node.args])
        for argument, partial in zip(node.args, partials, strict=True):
            if partial is not None and forward.nodes[argument].op != "constant":
                accumulate(argument, partial)

    node_of = {node.value: i for i, node in enumerate(forward.nodes) if node.op == "input"}
    outputs = [cotangents.get(node_of.get(name, -1), trace.constant(0)) for name in forward.inputs]
    return trace.graph(f"{forward.name}_backward", forward.file, inputs, outputs)
