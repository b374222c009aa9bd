"""A plan as text for people: lines of at most 80 columns."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from lmscale.base.units import show_bytes, show_count
from lmscale.config.engine_kinds import ENGINE_KINDS
from lmscale_launcher.planner.warnings import USABLE_FRAC

_COLUMNS, _INDENT = 80, 15
_PARTS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss": "loss",
    "working": "working",
}


def plan_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """One paragraph per topic, then the memory of a rank as a table, then the warnings."""
    for topic, text in _topics(plan):
        yield from _paragraph(topic, text)
    yield ""
    yield from _memory(plan)
    if plan["warnings"]:
        yield ""
        yield f"{len(plan['warnings'])} warning{'s' if len(plan['warnings']) > 1 else ''}"
    for warning in plan["warnings"]:
        yield from wrap(
            f"{warning['key']}: {warning['fact']}",
            _COLUMNS,
            initial_indent="  - ",
            subsequent_indent="    ",
        )
        yield from wrap(
            f"hint: {warning['hint']}", _COLUMNS, initial_indent="    ", subsequent_indent="    "
        )


def as_json(value: dict[str, Any]) -> str:
    """One line for programs."""
    return json.dumps(value)


def _topics(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "run folder", _run_folder(plan)
    yield "model", _model(plan)
    yield "corpus", _corpus(plan)
    yield "length", _length(plan)
    samples, tokens = plan["global_batch_samples"], plan["global_batch_tokens"]
    yield "global batch", f"{samples:,} samples, {tokens:,} tokens per step"
    yield "ranks", _ranks(plan)
    yield "mesh", _mesh(plan)
    yield "per step", _step(plan)
    if plan["node_reads"] is not None:
        yield "reading", _reading(plan["node_reads"], plan["cluster"]["nodes"])
    yield "checkpoints", _checkpoints(plan["checkpoints"])


def _run_folder(plan: Mapping[str, Any]) -> str:
    if not plan["stands_at"]:
        return _short(plan["run_dir"])
    return f"{_short(plan['run_dir'])}, at step {plan['stands_at']:,}"


def _model(plan: Mapping[str, Any]) -> str:
    model = plan["model"]
    frozen = model["parameters"] - model["trainable"]
    rest = f", {show_count(frozen)} of them frozen" if frozen else ""
    return (
        f"{show_count(model['parameters'])} parameters{rest}: {_several(model['layers'], 'layer')} of width "
        f"{model['width']:,}, vocabulary of {plan['vocab_size']:,} ({_vocabulary(plan)})"
    )


def _vocabulary(plan: Mapping[str, Any]) -> str:
    match plan["vocab_from"]:
        case "assumed":
            return "assumed; set model.vocab_size to plan another"
        case "corpus":
            return "of the corpus"
    return str(plan["vocab_from"])


def _corpus(plan: Mapping[str, Any]) -> str:
    path = _short(plan["corpus"])
    if plan["corpus_samples"] is None:
        return f"{path} does not exist; make it with: lmscale prepare {path} INPUT..."
    return f"{path}: {plan['corpus_samples']:,} samples, {show_count(plan['corpus_tokens'])} tokens"


def _length(plan: Mapping[str, Any]) -> str:
    if plan["steps"] is None:
        return f"{plan['epochs']:g} epochs; the number of steps follows from the corpus"
    steps = f"{plan['steps']:,} steps, {show_count(plan['tokens'])} tokens"
    return steps if plan["epochs"] is None else f"{steps}, {plan['epochs']:.2f} epochs"


def _ranks(plan: Mapping[str, Any]) -> str:
    cluster = plan["cluster"]
    nodes, min_nodes = cluster["nodes"], cluster["min_nodes"]
    count = _several(nodes, "node") if nodes == min_nodes else f"{min_nodes} to {nodes} nodes"
    device = "GPU" if cluster["device"] == "cuda" else "CPU"
    launch = f"; one task per {cluster['launch']}" if cluster["launch"] else ""
    return (
        f"{plan['ranks']:,} {device} rank{'s' if plan['ranks'] > 1 else ''}: {cluster['kind']}, "
        f"{count} x {cluster['ranks_per_node']}{launch}"
    )


def _mesh(plan: Mapping[str, Any]) -> str:
    mesh, engine = plan["mesh"], plan["engine"]
    stage = f", ZeRO-{engine['zero_stage']}," if engine["zero_stage"] is not None else ""
    split = ", tokens split between the layers" if engine["sequence_parallel"] else ""
    return (
        f"{engine['kind']}{stage} in {engine['precision']}: replicate {mesh['replicate']} x shard "
        f"{mesh['shard']} x tp {mesh['tp']}{split}"
    )


def _step(plan: Mapping[str, Any]) -> str:
    batches = _several(plan["micro_batches"], "micro-batch", "micro-batches")
    wasted = (
        f"{100 * plan['wasted_frac']:.1f} % of the rows are fillers"
        if plan["wasted_frac"]
        else "no fillers"
    )
    return (
        f"{batches} of up to {_several(plan['micro_batch'], 'sample')} on each of "
        f"{plan['dp_size']:,} data-parallel ranks; {wasted}"
    )


def _reading(reads: Mapping[str, Any], nodes: int) -> str:
    about = "" if reads["exact"] else "about "
    each = "the node reads" if nodes == 1 else "a node reads"
    shared = ""
    if nodes > 1:
        several = (
            f"{reads['shared_chunks']:,} chunks are" if reads["shared_chunks"] else "no chunk is"
        )
        shared = f"; {several} read by several nodes"
    return (
        f"in {_several(reads['steps'], 'step')} {each} {about}{_span(reads['shards'])} of "
        f"{reads['of_shards']:,} shards, {_span(reads['bytes'], show_bytes)}{shared}"
    )


def _span(values: list[int], show: Any = "{:,}".format) -> str:
    minimum, maximum = map(show, values)
    return str(maximum) if minimum == maximum else f"{minimum} to {maximum}"


def _checkpoints(saves: Mapping[str, Any]) -> str:
    cadence = []
    if saves["every_steps"]:
        cadence.append(f"every {_several(saves['every_steps'], 'step')}")
    if saves["every_minutes"]:
        cadence.append(f"every {saves['every_minutes']:g} min")
    when = " and ".join(cadence) or "at the end only"
    return (
        f"{show_bytes(saves['bytes'])} each, {when}; {saves['keep']} kept and one being written: "
        f"{show_bytes(saves['bytes_on_disk'])} of disk"
    )


def _memory(plan: Mapping[str, Any]) -> Iterator[str]:
    memory, total = plan["memory"], plan["memory"]["total"]
    yield "memory per rank, about (activations +-30 %)"
    for name, label in _PARTS.items():
        yield f"  {label:<12}{show_bytes(memory[name]):>10}  {memory[name] / total:>4.0%}  {_note(name, plan)}".rstrip()
    room = memory["room"]
    gpu = plan["cluster"]["device"] == "cuda"
    if room:
        available = f"of {show_bytes(room)}, {'the GPU' if gpu else 'its share of this host'}"
    else:
        available = f"{'a GPU' if gpu else 'a host'} of unknown size; use at most {USABLE_FRAC:.0%}"
    yield f"  {'sum':<12}{show_bytes(total):>10}        {available}"
    if host := memory["host"]:
        node = plan["cluster"]["ranks_per_node"] * host
        yield f"  {'on the host':<12}{show_bytes(host):>10}        {show_bytes(node)} per node"
    if (bytes_at_min_nodes := plan["memory_at_min_nodes"]) is not None:
        nodes = _several(plan["cluster"]["min_nodes"], "node")
        yield f"  {'sum':<12}{show_bytes(bytes_at_min_nodes):>10}        with {nodes}, the minimum"


def _note(name: str, plan: Mapping[str, Any]) -> str:
    engine = plan["engine"]
    kind, recompute = engine["kind"], engine["activation_checkpointing"]
    match name:
        case "optimizer":
            return "masters and moments" if ENGINE_KINDS[kind].uses_zero_stage else "moments"
        case "activations":
            again = "" if recompute == "none" else f", recomputing {recompute}"
            return f"of {_several(plan['micro_batch'], 'sample')}{again}"
        case "loss":
            return "logits of one chunk, gradient of the head"
        case "working":
            return ENGINE_KINDS[kind].working_memory
    return ""


def _short(path: str) -> str:
    """The path relative to the current folder where it is inside."""
    folder = Path.cwd()
    return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path


def _several(count: int, singular: str, plural: str = "") -> str:
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def _paragraph(topic: str, text: str) -> Iterator[str]:
    lines = wrap(text, _COLUMNS - _INDENT, break_on_hyphens=False, break_long_words=False)
    for index, line in enumerate(lines):
        yield f"{topic if index == 0 else '':<{_INDENT}}{line}"
