"""How much of how many architectures can be pruned, and is the result right?

    python benchmarks/prunability.py [--families timm diffusers] [--names '*resnet*'] [--limit 10]
                                     [--tools secateurs torch-pruning] [--timeout 300] [--retry]
    python benchmarks/prunability.py --show > docs/prunability.md

Half of every free axis is removed, units drawn at random, in every model of
`prunability_models`; the shortened model is run and compared with the oracle: dense, with what
consumes the removed units at zero. Exact is a relative gap of at most 1e-5 in float32; what is
above is repeated in float64, where it must be at most 1e-10. Biases, norm weights and running
statistics are drawn at random first, so that a mistake shows.

Torch-Pruning 1.6 is used as its documentation says: `MetaPruner`, magnitudes, pruning ratio 0.5,
the classifier ignored, `num_heads` given for attention and the attributes set afterwards, by
names that many models share; forwards are not rewritten by hand, as its examples do for some.
It checks nothing; "runs" means that a forward pass gives outputs of the dense shapes.

Seconds: tracing, analysis, surgery and (ours) every check and run that `shorten` makes; not the
building of the model. Each model and tool is a process of its own, forked warm, one thread.
Results are appended to a JSON-lines file; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import logging
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from prunability_models import Case, cases
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateurs.structure.dimensions import is_frozen, plain_axes
from secateurs.structure.surgery import shorten
from secateurs.structure.trace import Trace, as_call, trace, traceable

TOOLS = ("secateurs", "torch-pruning")
EXACT_SINGLE = 1e-5
EXACT_DOUBLE = 1e-10
MEMORY = 14 << 30
"""Bytes of data a model's process may hold."""
TABLE_WIDTH = 90
"""Characters of a reason in the table."""

Record = dict[str, Any]


# --- one model --------------------------------------------------------------------------------


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Move parameters and running statistics away from zeros and ones."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.02 * noise(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * noise(buffer)
            elif name.endswith("running_var"):
                buffer *= 1 + noise(buffer).abs()


def free_axes(found: Trace) -> list[Any]:
    """The plain axes of parameters that can be shortened, in order."""
    free: dict[Any, None] = {}
    for dims in found.tensors.values():
        for dim in dims:
            for axis in plain_axes(dim):
                if axis.frozen is None and axis.size > 1:
                    free[axis] = None
    return list(free)


def prunable_share(found: Trace) -> float:
    """Share of the parameters that lie on an axis that can be shortened."""
    sizes = {name: p.numel() for name, p in found.model.named_parameters()}
    free = sum(n for name, n in sizes.items() if not all(is_frozen(d) for d in found.tensors[name]))
    return free / max(sum(sizes.values()), 1)


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def as_double(value: Any) -> Any:
    """Floating-point tensors in float64."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def halved(model: nn.Module, inputs: Any, seed: int = 0) -> Record:
    """Remove half of every free axis with secateurs."""
    model.eval()
    dense = count(model)
    start = time.perf_counter()
    found = trace(model, inputs)
    traced = time.perf_counter() - start
    free, share = free_axes(found), prunable_share(found)
    generator = np.random.default_rng(seed)
    kept = {a: np.sort(generator.permutation(a.size)[: max(1, a.size // 2)]) for a in free}
    start = time.perf_counter()
    shortened = shorten(found, kept, any_batch=False)
    seconds = traced + time.perf_counter() - start
    return {
        "axes": len(free),
        "prunable": share,
        "kept": count(shortened.model) / dense,
        "form": shortened.form,
        "gap": shortened.gap,
        "seconds": seconds,
        "traced": traced,
        "unruled": found.notes.unruled,
        "parameters": dense,
    }


def with_secateurs(case: Case) -> Record:
    """Our record of one model; in float64 if float32 is not precise enough to tell."""
    model, inputs = _built(case)
    record = halved(model, inputs) | {"precision": "float32"}
    if not record["gap"] <= EXACT_SINGLE:
        single = record["gap"]
        del model
        gc.collect()
        model, inputs = _built(case)
        torch.set_default_dtype(torch.float64)
        again = halved(model.double(), tree_map(as_double, inputs))
        record |= {"gap": again["gap"], "gap32": single, "precision": "float64"}
    limit = EXACT_SINGLE if record["precision"] == "float32" else EXACT_DOUBLE
    return record | {"runs": True, "exact": bool(record["gap"] <= limit)}


def _built(case: Case) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, inputs = case.build()
    randomise(model.eval())
    return model, inputs


def with_torch_pruning(case: Case) -> Record:
    """Torch-Pruning's record of one model."""
    import torch_pruning

    model, inputs = _built(case)
    dense = count(model)
    args, kwargs = as_call(inputs)
    with traceable(model), torch.no_grad():
        before, ignored = _outputs_and_their_layers(model, args, kwargs)
    heads = _attention_heads(model)
    start = time.perf_counter()
    with traceable(model):
        pruner = torch_pruning.pruner.MetaPruner(
            model,
            kwargs or (args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args),
            importance=torch_pruning.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.5,
            ignored_layers=ignored,
            num_heads=heads,
            output_transform=_tensors_of_outputs,
        )
        pruner.step()
    _set_attention_sizes(model, pruner)
    seconds = time.perf_counter() - start
    with traceable(model), torch.no_grad():
        after = model(*args, **kwargs)
    shapes = [[x.shape for x in tree_leaves(o) if isinstance(x, Tensor)] for o in (before, after)]
    return {
        "kept": count(model) / dense,
        "seconds": seconds,
        "runs": True,
        "changed outputs": shapes[0] != shapes[1] and "detection" not in type(model).__module__,
    }


def _tensors_of_outputs(outputs: Any) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]


def _outputs_and_their_layers(
    model: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, list[nn.Module]]:
    """The dense outputs, and the layers to ignore: classifiers, and what makes an output."""
    made: dict[int, nn.Module] = {}
    kept_alive: list[Any] = []

    def note(module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, Tensor) and not list(module.children()):
            made[id(out)] = module
            kept_alive.append(out)

    handles = [m.register_forward_hook(note) for m in model.modules()]
    outputs = model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    ignored = [made[id(x)] for x in tree_leaves(outputs) if id(x) in made]
    classes = getattr(model, "num_classes", None) or 1000
    for module in model.modules():
        if getattr(module, "out_features", getattr(module, "out_channels", None)) == classes:
            ignored.append(module)
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return outputs, [*ignored, *([head] if head is not None else [])]


def _attention_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Query, key and value layers with their number of heads, as its examples collect them."""
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        number = getattr(module, "num_attention_heads", getattr(module, "num_heads", None))
        for name in ("qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj"):
            layer = getattr(module, name, None)
            if isinstance(number, int) and isinstance(layer, nn.Linear):
                heads[layer] = number
    return heads


def _set_attention_sizes(model: nn.Module, pruner: Any) -> None:
    """What its examples for ViT, Swin and BERT set after pruning."""
    for module in model.modules():
        for name, times in (("qkv", 3), ("query", 1), ("q_proj", 1)):
            layer = getattr(module, name, None)
            if not isinstance(layer, nn.Linear) or layer not in pruner.num_heads:
                continue
            number = pruner.num_heads[layer]
            sizes = {
                "num_heads": number,
                "num_attention_heads": number,
                "head_dim": layer.out_features // (times * number),
                "attention_head_size": layer.out_features // (times * number),
                "all_head_size": layer.out_features // times,
                "embed_dim": layer.out_features // times,
            }
            for attribute, size in sizes.items():
                if isinstance(vars(module).get(attribute), int):
                    setattr(module, attribute, size)


# --- all models -------------------------------------------------------------------------------


def attempt(case: Case, tool: str, sender: Any) -> None:
    """What a model's process does: send its record, or why there is none."""
    warnings.filterwarnings("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    start = time.perf_counter()
    try:
        record = {"secateurs": with_secateurs, "torch-pruning": with_torch_pruning}[tool](case)
    except BaseException as failure:
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())
        place = traceback.extract_tb(failure.__traceback__)[-1]
        record = {
            "runs": False,
            "exact": False,
            "reason": reason[:400],
            "place": f"{Path(place.filename).name}:{place.lineno}",
            "seconds": time.perf_counter() - start,
        }
    sender.send(record)
    sender.close()


def supervised(case: Case, tool: str, timeout: float) -> Record:
    """The record of one model and tool, from a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(case, tool, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    record: Record = {"runs": False, "exact": False, "seconds": timeout}
    try:
        if receiver.poll(timeout):
            record = receiver.recv()
        else:
            record["reason"] = f"not done after {timeout:.0f} s"
    except EOFError:
        record |= {"reason": "its process died", "seconds": time.perf_counter() - start}
    process.kill()
    process.join()
    return {"family": case.family, "name": case.name, "tool": tool, **record}


def warm_up(chosen: list[Case]) -> None:
    """Import what both tools import while they work, so that forked processes have it."""
    import contextlib
    import io

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    inputs = torch.randn(1, 3, 8, 8)
    with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):
        import torch_pruning

        torch_pruning.DependencyGraph().build_dependency(model, inputs)
    halved(model, inputs)
    seen = set()
    for case in chosen:  # building one of each family imports what the family needs
        if case.family not in seen:
            seen.add(case.family)
            case.build()


def read(path: Path) -> dict[tuple[str, str, str], Record]:
    """Records by (family, name, tool); the last of several counts."""
    found: dict[tuple[str, str, str], Record] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found[record["family"], record["name"], record["tool"]] = record
    return found


def selected(options: argparse.Namespace) -> Iterator[Case]:
    """The models that were asked for."""
    left = options.limit
    for case in cases():
        if options.families and case.family not in options.families:
            continue
        if options.names and not any(fnmatch.fnmatch(case.name, p) for p in options.names):
            continue
        if left == 0:
            return
        left -= 1
        yield case


def run(options: argparse.Namespace) -> None:
    """Fill the results file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    chosen = list(selected(options))
    warm_up(chosen)
    done = read(options.results)
    with options.results.open("a") as results:
        for case in chosen:
            for tool in options.tools:
                old = done.get((case.family, case.name, tool))
                if options.again or old is None or (options.retry and not _succeeded(old)):
                    record = supervised(case, tool, options.timeout)
                    results.write(json.dumps(record) + "\n")
                    results.flush()
                    print(line_of(record), flush=True)


def _succeeded(record: Record) -> bool:
    return bool(record["exact"] if record["tool"] == "secateurs" else record["runs"])


def line_of(record: Record) -> str:
    """A record on one line."""
    head = f"{record['tool']:13} {record['name']:44} {record['seconds']:6.1f} s "
    if not record["runs"]:
        return head + f"FAILED {record.get('reason', '')[:200]} [{record.get('place', '')}]"
    head += f"kept {record['kept']:.2f} "
    if record["tool"] == "secateurs":
        head += (
            f"axes {record['axes']:3} prunable {record['prunable']:.2f} {record['form']:6} "
            f"gap {record['gap']:.1e} {record['precision']}"
            f"{'' if record['exact'] else ' INEXACT'} {record['unruled'] or ''}"
        )
    return head


# --- the table --------------------------------------------------------------------------------


def table(records: dict[tuple[str, str, str], Record]) -> str:
    """All results as Markdown."""
    families = list(dict.fromkeys(family for family, _, _ in records))
    by_name: dict[str, dict[str, dict[str, Record]]] = defaultdict(lambda: defaultdict(dict))
    for (family, name, tool), record in records.items():
        by_name[family][name][tool] = record
    lines = [
        "# Which architectures can be pruned",
        "",
        "Printed by `python benchmarks/prunability.py --show`; how it is measured is said there.",
        "Half of every free axis removed, units at random, one CPU thread. *Exact*: the shortened",
        "model gives what the dense one gives with everything that consumes the removed units at",
        "zero (relative gap at most 1e-5 in float32, or 1e-10 in float64). *Prunable*: share of",
        "the parameters on an axis that can be shortened. *Kept*: share of the parameters left.",
        "",
        "| family | models | secateurs: exact | Torch-Pruning: runs | secateurs, s "
        "| Torch-Pruning, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    total = np.zeros(5)
    for family in families:
        rows = by_name[family].values()
        ours = [r["secateurs"] for r in rows if "secateurs" in r]
        theirs = [r["torch-pruning"] for r in rows if "torch-pruning" in r]
        numbers = np.array([
            len(rows), sum(r["exact"] for r in ours), sum(r["runs"] for r in theirs),
            sum(r["seconds"] for r in ours), sum(r["seconds"] for r in theirs),
        ])  # fmt: skip
        total += numbers
        lines.append(_totals(family, numbers))
    lines += [_totals("**all**", total), "", *_both(records)]
    for family in families:
        lines += _details(family, by_name[family])
    return "\n".join(lines)


def _both(records: dict[tuple[str, str, str], Record]) -> list[str]:
    """What the sums are made of: times of models that both prune, and runs that hit the limit."""
    pairs = [
        (records[family, name, "secateurs"]["seconds"], record["seconds"])
        for (family, name, tool), record in records.items()
        if tool == "torch-pruning" and record["runs"] and (family, name, "secateurs") in records
    ]
    reasons = (r.get("reason", "") for (_, _, t), r in records.items() if t == "torch-pruning")
    over = Counter(reason for reason in reasons if reason.startswith("not done"))
    listed = ", ".join(f"{count} {reason}" for reason, count in over.most_common())
    return [
        f"Of Torch-Pruning's runs, {listed or 'all were done in time'}; these count with the time",
        f"that they were given. On the {len(pairs)} models that both prune, secateurs takes",
        f"{sum(a for a, _ in pairs):.0f} s, checks included, and Torch-Pruning",
        f"{sum(b for _, b in pairs):.0f} s. Most of our time is torch.export's. The machine was",
        "shared with other work.",
        "",
    ]


def _totals(name: str, numbers: np.ndarray) -> str:
    models, exact, runs, ours, theirs = numbers
    share = 100 / max(models, 1)
    return (
        f"| {name} | {models:.0f} | {exact:.0f} ({exact * share:.1f} %) "
        f"| {runs:.0f} ({runs * share:.1f} %) | {ours:.0f} | {theirs:.0f} |"
    )


def _details(family: str, rows: dict[str, dict[str, Record]]) -> list[str]:
    lines = [
        f"## {family}",
        "",
        "| model | axes | prunable | kept | form | gap | s | Torch-Pruning: kept | s |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | --- | ---: |",
    ]
    for name, row in sorted(rows.items()):
        ours, theirs = row.get("secateurs"), row.get("torch-pruning")
        cells = ["", "", "", "", "", ""]
        if ours is not None and ours["runs"]:
            gap = f"{ours['gap']:.0e}" + (" (64)" if ours["precision"] == "float64" else "")
            cells = [
                str(ours["axes"]), f"{ours['prunable']:.2f}", f"{ours['kept']:.2f}", ours["form"],
                gap if ours["exact"] else f"**{gap}**", f"{ours['seconds']:.1f}",
            ]  # fmt: skip
        elif ours is not None:
            cells = ["", "", "", _reason(ours), "", f"{ours['seconds']:.1f}"]
        other = ["", ""]
        if theirs is not None:
            kept = f"{theirs['kept']:.2f}" if theirs["runs"] else _reason(theirs)
            if theirs.get("changed outputs"):
                kept += " (outputs of other shapes)"
            other = [kept, f"{theirs['seconds']:.1f}"]
        lines.append("| " + " | ".join([name, *cells, *other]) + " |")
    return [*lines, ""]


def _reason(record: Record) -> str:
    text = record.get("reason", "").replace("|", "/").replace("<", "&lt;")
    return text if len(text) <= TABLE_WIDTH else text[: TABLE_WIDTH - 1] + "…"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", nargs="*", help="of these only")
    parser.add_argument("--names", nargs="*", help="wildcards of names")
    parser.add_argument("--limit", type=int, default=-1, help="at most so many models")
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    parser.add_argument("--timeout", type=float, default=300, help="seconds a model may take")
    parser.add_argument("--results", type=Path, default=Path("prunability.jsonl"))
    parser.add_argument("--retry", action="store_true", help="what failed before, once more")
    parser.add_argument("--again", action="store_true", help="everything once more")
    parser.add_argument("--show", action="store_true", help="print the table of the results file")
    options = parser.parse_args()
    if options.show:
        print(table(read(options.results)))
    else:
        run(options)


if __name__ == "__main__":
    main()
