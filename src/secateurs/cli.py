"""The command line: what there is to prune, to run, to resume, to compare and to look at."""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from secateurs import __version__
from secateurs.errors import InputError, SecateursError, require
from secateurs.registry import (
    NEEDS,
    VOCABULARY,
    WHEN,
    Option,
    list_methods,
    method_class,
    options_of,
)
from secateurs.settings import TrainSettings

MODEL_HELP = (
    "MODEL: zoo:NAME, torchvision:NAME, timm:NAME, pretrained:NAME, hf:NAME_OR_FOLDER, "
    "FILE.onnx, python:module:function, "
    "the folder of a run or saved outcome, or any of these followed by @FILE.safetensors."
)
DATA_HELP = (
    "digits, fashion-mnist[:FOLDER], imagefolder:PATH, hf:NAME, text:PATH, "
    "photographs, topics, noise, python:module:function; options follow a '?', such as "
    "fashion-mnist?limit=6000&size=14"
)

DEMOS = {"digits": "demo.yaml", "photographs": "demo_photographs.yaml"}


def console() -> Console:
    """Where people read; standard output is kept for results."""
    return Console(stderr=True)


class Group(click.Group):
    """Commands whose refusals end with exit code 2 and one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and turn refusals into one line on standard error."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.Abort:
            refuse("interrupted", 130)
        except click.UsageError as error:
            refuse(error.format_message(), 2)
        except SecateursError as error:
            refuse(str(error), 2)
        sys.exit(code if isinstance(code, int) else 0)


def refuse(reason: str, code: int) -> typing.NoReturn:
    """One line on standard error, and the end."""
    click.echo(f"secateurs: {' '.join(reason.split())}", err=True)
    sys.exit(code)


@click.group(
    cls=Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="secateurs")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Prune neural networks by published methods, and see what was won and lost."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


# ---------------------------------------------------------------- options of methods


class MethodCommand(click.Command):
    """A command that takes the hyper-parameters of ``--method`` as options of its own."""

    def make_parser(self, ctx: click.Context) -> Any:
        """The parser, with the options of the method that stands in the arguments."""
        self._add_options(ctx)
        return super().make_parser(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Look for the method first, since it decides which options there are."""
        ctx.meta["method"] = _method_in(args)
        return super().parse_args(ctx, args)

    def _add_options(self, ctx: click.Context) -> None:
        ctx.meta.setdefault("options", [])
        name = ctx.meta.get("method")
        if name and not ctx.meta["options"]:
            taken = {opt for p in super().get_params(ctx) for opt in p.opts}
            ctx.meta["options"] = method_options(name, taken)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Own parameters and those of the method."""
        return [*super().get_params(ctx), *ctx.meta.get("options", [])]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The method's options in a section of their own."""
        own = [r for p in super().get_params(ctx) if (r := p.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(own)
        name = ctx.meta.get("method")
        if name:
            rows = [r for o in ctx.meta.get("options", []) if (r := o.get_help_record(ctx))]
            paper = method_class(name).paper
            with formatter.section(f"Options of {name}" + (f" [{paper}]" if paper else "")):
                formatter.write_dl(rows or [("(none)", "")])
        else:
            with formatter.section("Methods (--method NAME --help shows the options of one)"):
                formatter.write_dl(
                    [(n, summary(cls)) for n, cls in list_methods().items() if self.runs(cls)]
                )

    def runs(self, cls: type[Any]) -> bool:
        """Whether a method is one for this command: here, those that prune models."""
        return kind_of(cls) != "Selector"


class SelectCommand(MethodCommand):
    """The same for methods that choose samples."""

    def runs(self, cls: type[Any]) -> bool:
        """Those that choose samples."""
        return kind_of(cls) == "Selector"


def _method_in(args: Sequence[str]) -> str | None:
    for position, word in enumerate(args):
        if word.startswith("--method="):
            return _known(word.partition("=")[2])
        if word == "--method" and position + 1 < len(args):
            return _known(args[position + 1])
    return None


def _known(name: str) -> str:
    return str(method_class(name).name)


def summary(cls: type[Any]) -> str:
    """The first line of a method's own docstring."""
    return (cls.__doc__ or "").strip().splitlines()[0]


def method_options(name: str, taken: set[str]) -> list[click.Option]:
    """Click options from the fields of a method; types, units and defaults are the fields'."""
    hints = typing.get_type_hints(method_class(name))
    made = []
    for item in options_of(method_class(name)):
        flag = "--" + item.name.replace("_", "-")
        if flag in taken:
            flag = f"--{name}-{item.name.replace('_', '-')}"
        made.append(_click_option(item, flag, hints[item.name]))
    return made


def _click_option(item: Option, flag: str, hint: Any) -> click.Option:
    text = item.help + (f" [{item.unit}]" if item.unit else "")
    names = [f"method__{item.name}", flag]
    if hint is bool:
        both = f"{flag}/--no-{flag.removeprefix('--')}"
        default = "yes" if item.default else "no"
        return click.Option([names[0], both], default=None, help=f"{text}  [default: {default}]")
    shown = plain_default(item.default)
    return click.Option(
        names,
        default=None,
        metavar=item.type.upper() if "|" not in item.type else item.type,
        help=f"{text}  [default: {shown}]",
    )


def plain_default(value: Any) -> str:
    """A default as a person would write it."""
    if value is None:
        return "none"
    if isinstance(value, tuple | list | dict) and not value:
        return "none"
    if isinstance(value, tuple | list):
        return ",".join(str(v) for v in value)
    return str(value)


def given_options(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """The method's options that were given, read from their texts."""
    hints = typing.get_type_hints(cls)
    given = {}
    for key, value in values.items():
        if key.startswith("method__") and value is not None:
            name = key.removeprefix("method__")
            given[name] = read_value(value, hints[name])
    return given


def read_value(text: Any, hint: Any) -> Any:
    """A command-line text in the form that a field's type asks for."""
    if not isinstance(text, str):
        return text
    origin = typing.get_origin(hint)
    if text.lower() == "none" and type(None) in typing.get_args(hint):
        return None
    if origin is tuple:
        return tuple(part for part in text.split(",") if part)
    if origin is dict:
        from secateurs.runs.recipe import parse_yaml

        return parse_yaml(text, "option")
    return text


def settings_from(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """KEY=VALUE texts as changes to the training settings."""
    hints = typing.get_type_hints(TrainSettings)
    changes = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        require(
            bool(sign) and key in hints, option, pair, "KEY=VALUE with KEY of " + ", ".join(hints)
        )
        changes[key] = read_value(value, hints[key])
    return changes


def settings_help() -> str:
    """The training settings with their types, for the help."""
    return "; ".join(f"{o.name} ({o.type})" for o in options_of(TrainSettings))


# ---------------------------------------------------------------- running


@contextmanager
def listening(quiet: bool, tracker: Any = None) -> Iterator[list[Any]]:
    """Listeners for a run: bars on the terminal, a tracker."""
    from secateurs.runs.progress import ProgressBars, make_progress

    with make_progress(console()) as progress:
        listeners: list[Any] = [] if quiet else [ProgressBars(progress)]
        try:
            yield listeners + ([tracker] if tracker else [])
        finally:
            if tracker:
                tracker.close()


def execute_run(run: Any, *, as_json: bool, track: str | None = None) -> None:
    """Run or resume, write the report, and print the result."""
    from secateurs.runs.progress import Tracker

    with_report = can_report()
    tracker = None
    if track and not run.finished:
        tracker = Tracker(track, run.folder.name, run.folder / "tracking", run.recipe.as_dict())
    try:
        with listening(as_json, tracker) as listeners:
            outcome = run.execute(listeners)
    except InputError:
        run.discard()  # or the same command would be refused for a folder that is not empty
        raise
    path = write_run_report(run.folder) if with_report else None
    if as_json:
        click.echo(json.dumps({"run": str(run.folder), **outcome.as_dict()}, default=str))
        return
    from secateurs.report.console import outcome_table

    Console().print(outcome_table([outcome.as_dict()]))
    if outcome.promise is not None:
        click.echo(f"budget  {outcome.promise}")
    for note in outcome.notes:
        click.echo(f"note    {note}")
    click.echo(f"run     {run.folder}")
    click.echo(f"report  {path or 'not written'}")


def can_report() -> bool:
    """Whether a report can be written; if not, says before the work begins what is missing."""
    from secateurs.report.html import missing_libraries

    missing = missing_libraries()
    if missing:
        click.echo(
            f"note    no report without {' and '.join(missing)}: pip install 'secateurs[report]', "
            "now or later; then `secateurs report RUN` writes it",
            err=True,
        )
    return not missing


def write_run_report(folder: Path) -> Path:
    """The report of a run, from what is in its folder."""
    from secateurs.outcome import PLAN, read_plan
    from secateurs.report.html import write_report
    from secateurs.runs.run import ENVIRONMENT, EVENTS, RECIPE, REPORT, Run
    from secateurs.workspace import read_events

    run = Run(folder)
    require(run.finished, "run", str(folder), "a finished run (secateurs resume finishes it)")
    plan = read_plan(folder / "outcome" / PLAN)
    return write_report(
        folder / REPORT,
        title=f"{run.recipe.model} on {run.recipe.data}",
        outcomes=[plan],
        recipe=(folder / RECIPE).read_text(),
        events=read_events(folder / EVENTS),
        environment=json.loads((folder / ENVIRONMENT).read_text()),
    )


def fresh_folder(base: str) -> Path:
    """``runs/BASE``, or ``runs/BASE-2`` and so on where that is taken."""
    number = 1
    while (folder := Path("runs") / (base if number == 1 else f"{base}-{number}")).exists():
        number += 1
    return folder


json_option = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
out_option = click.option(
    "--out", type=click.Path(path_type=Path), help="output folder, new or empty"
)
track_option = click.option("--track", metavar="NAME", help="tensorboard, mlflow or wandb")


@main.command(cls=MethodCommand)
@click.argument("model")
@click.option("--data", metavar="DATA", help=DATA_HELP + "; without it, noise")
@click.option("--method", required=True, metavar="NAME", help="the pruning method, see below")
@click.option(
    "--budget",
    required=True,
    help="the promise: sparsity=0.9, density=0.1, params=2M, 2:4 ... as the method can honour",
)
@click.option(
    "--base", metavar="MODEL", help="what MODEL was fine-tuned from, to prune the difference"
)
@out_option
@click.option("--seed", type=int, default=0, show_default=True, help="of everything random")
@click.option("--batch-size", type=int, default=64, show_default=True, help="samples a batch")
@click.option("--epochs", type=float, help="epochs of training [default: of the data]")
@click.option("--finetune-epochs", type=float, help="epochs of recovery [default: of the data]")
@click.option(
    "--train", "train", multiple=True, metavar="KEY=VALUE", help="training: " + settings_help()
)
@click.option("--finetune", multiple=True, metavar="KEY=VALUE", help="recovery: the same keys")
@click.option("--label-smoothing", type=float, default=0.0, show_default=True, help="of the loss")
@click.option(
    "--recover",
    metavar="HOW",
    default="usual",
    show_default=True,
    help="training afterwards: usual (what the method has), finetune, lora, perp, none",
)
@click.option("--no-recover", is_flag=True, help="the same as --recover none")
@click.option("--threads", type=int, help="threads of torch [default: of the machine]")
@click.option("--latency/--no-latency", default=True, show_default=True, help="time the models")
@click.option(
    "--engines",
    default="eager",
    show_default=True,
    help="in which they are timed, with commas between: eager, compile, onnxruntime, and of the "
    "pruned model packed: 2:4, block",
)
@track_option
@json_option
def prune(**values: Any) -> None:
    """Prune MODEL by a method, let it recover, measure, and write a report.

    A model without trained weights is trained first where the method expects that.
    """
    from secateurs.runs.recipe import Recipe, stages_for
    from secateurs.runs.run import Run
    from secateurs.zoo.catalog import has_weights

    options = given_options(method_class(values["method"]), values)
    training = settings_from(values["train"], "--train")
    finetuning = settings_from(values["finetune"], "--finetune")
    if values["epochs"] is not None:
        training["epochs"] = values["epochs"]
    if values["finetune_epochs"] is not None:
        finetuning["epochs"] = values["finetune_epochs"]
    fresh = not has_weights(values["model"])
    if values["base"] is not None:
        options["base"] = values["base"]
    how = "none" if values["no_recover"] else values["recover"]
    options["recover"] = True if how == "usual" else how
    stages = stages_for(values["method"], values["budget"], options, fresh=fresh)
    recipe = Recipe(
        model=values["model"],
        data=values["data"] or "noise",
        stages=tuple(stages),
        seed=values["seed"],
        batch_size=values["batch_size"],
        threads=values["threads"],
        label_smoothing=values["label_smoothing"],
        latency=values["latency"],
        engines=tuple(name.strip() for name in values["engines"].split(",")),
        training=training,
        finetuning=finetuning,
    )
    recipe.make_task()
    run = Run.create(recipe, values["out"] or fresh_folder(values["method"]))
    execute_run(run, as_json=values["as_json"], track=values["track"])


@main.command("prune-shards", cls=MethodCommand)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--data", metavar="DATA", help="calibration inputs, where the method looks at any")
@click.option("--method", required=True, metavar="NAME", help="a layer-wise method, see below")
@click.option("--budget", required=True, help="the promise: sparsity=0.5, density=0.5 or 2:4")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="output folder: new, empty, or one that the same command left when it was killed",
)
@click.option("--seed", type=int, default=0, show_default=True, help="of the calibration inputs")
@json_option
def prune_shards(**values: Any) -> None:
    """Prune FOLDER, a transformers checkpoint that may be larger than memory, from disk to disk.

    One block at a time is in memory. Killed and started again it goes on at the block that was
    not finished. Plain from_pretrained reads the result.
    """
    from secateurs.api import prune_checkpoint
    from secateurs.calibration.layerwise import LayerwisePruner
    from secateurs.registry import create
    from secateurs.workspace import Workspace
    from secateurs.zoo.datasets import load_data

    chosen = create(values["method"], given_options(method_class(values["method"]), values))
    batches: list[Any] = []
    if isinstance(chosen, LayerwisePruner) and chosen.statistic != "none":
        require(values["data"] is not None, "--data", None, f"calibration data: {chosen.name}")
        loader, _ = load_data(values["data"]).loaders(seed=values["seed"])
        batches = chosen.inputs_of(loader, values["seed"])
    with listening(values["as_json"]) as listeners:
        told = prune_checkpoint(
            values["folder"], values["out"], chosen, values["budget"], batches,
            work=Workspace(listeners=listeners),
        )  # fmt: skip
    if values["as_json"]:
        click.echo(json.dumps({"folder": str(values["out"]), **told}))
        return
    click.echo(f"sparsity {told['sparsity']:.6g} of {len(told['layers'])} layers")
    for note in told["notes"]:
        click.echo(f"note    {note}")
    click.echo(f"folder  {values['out']}")


@main.command(epilog=MODEL_HELP)
@click.argument("data")
@click.option(
    "--encoder",
    required=True,
    metavar="pixels|MODEL",
    help="what makes embeddings: the samples as they are, or a MODEL with weights",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.parquet",
    help="where ids, labels and embeddings are written",
)
@click.option(
    "--part",
    type=click.Choice(["train", "test"]),
    default="train",
    show_default=True,
    help="training samples, or those held out",
)
@click.option(
    "--take",
    type=click.Choice(["features", "outputs"]),
    help="what goes into the last linear layer, or what comes out of the model [default: outputs "
    "of sentence encoders, features of others]",
)
@click.option("--batch-size", type=int, default=64, show_default=True, help="samples a batch")
@click.option("--threads", type=int, help="threads of torch [default: of the machine]")
@json_option
def embed(**values: Any) -> None:
    """Write the embeddings of DATA, for `secateurs select`.

    DATA: digits, fashion-mnist, imagefolder:PATH, hf:NAME, topics?as=sentences,
    python:module:function ... The same command goes on where it was killed.
    """
    from secateurs.runs.embedding import embed as embed_data

    told = embed_data(watch=listening, **values)
    if values["as_json"]:
        click.echo(json.dumps(told))
        return
    classes = "with labels" if told["labels"] else "without labels"
    click.echo(f"rows    {told['rows']} of {told['width']} numbers, {classes}")
    click.echo(f"out     {told['out']}")


@main.command(cls=SelectCommand)
@click.argument("source", metavar="EMBEDDINGS", type=click.Path(path_type=Path))
@click.option("--method", required=True, metavar="NAME", help="how they are chosen, see below")
@click.option("--keep", required=True, type=float, help="the fraction that stays, such as 0.25")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.parquet",
    help="where ids, scores, clusters and who stays are written",
)
@click.option("--only-kept", is_flag=True, help="write only the rows that stay")
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="also write a page: what is kept of clusters and classes, examples, duplicates",
)
@click.option(
    "--images",
    metavar="COLUMN|HxW|DATA",
    help="for the page: a column with the paths of pictures, the shape that the embeddings have "
    "as pictures (8x8, 32x32x3), or the data set that was embedded",
)
@click.option("--text", metavar="COLUMN", help="for the page: texts of samples [default: text]")
@click.option(
    "--embedding", metavar="COLUMN", help="[default: embedding, or the only one of lists]"
)
@click.option("--id", "id_column", metavar="COLUMN", help="[default: id; else rows are numbered]")
@click.option("--label", metavar="COLUMN", help="[default: label]")
@click.option("--target", type=click.Path(path_type=Path), help="embeddings to select for")
@click.option(
    "--model",
    metavar="MODEL",
    help="for methods that train: a network such as zoo:mlp; EMBEDDINGS then names its data set, "
    "as --data does elsewhere, and rows are training samples",
)
@click.option("--forbid-empty-classes", is_flag=True, help="refuse to leave nothing of a class")
@click.option("--ray", metavar="ADDRESS", help="work on a Ray cluster: its address, auto or local")
@click.option("--seed", type=int, default=0, show_default=True, help="of everything random")
@click.option("--threads", type=int, help="threads of torch [default: of the machine]")
@json_option
def select(**values: Any) -> None:
    """Choose which rows of EMBEDDINGS to keep, and write the choice.

    EMBEDDINGS is a Parquet, Arrow, npy or npz file, or a folder of such. They are read shard by
    shard; the same command goes on where it was killed.
    """
    from secateurs.runs.selecting import select_files

    cls = method_class(values["method"])
    if kind_of(cls) != "Selector":
        raise InputError("method", values["method"], "a method that chooses samples, see --help")
    told = select_files(options=given_options(cls, values), watch=listening, **{
        k: v for k, v in values.items() if not k.startswith("method__")})  # fmt: skip
    if values["as_json"]:
        click.echo(json.dumps(told))
        return
    from secateurs.report.console import selection_table

    Console().print(selection_table(told))
    for note in told["notes"]:
        click.echo(f"note    {note}")
    click.echo(f"kept    {told['kept']} of {told['rows']} rows")
    click.echo(f"out     {values['out']}")
    if values["report"] is not None:
        click.echo(f"report  {values['report']}")


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@out_option
@track_option
@json_option
def run(recipe: Path, out: Path | None, track: str | None, as_json: bool) -> None:
    """Execute RECIPE, a YAML file of stages."""
    from secateurs.runs.recipe import Recipe
    from secateurs.runs.run import Run

    parsed = Recipe.read(recipe)
    parsed.make_task()
    made = Run.create(parsed, out or fresh_folder(recipe.stem))
    execute_run(made, as_json=as_json, track=track)


@main.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--workers", type=int, default=2, show_default=True, help="for a benchmark")
@click.option("--ray", metavar="ADDRESS", help="for a benchmark: a Ray cluster")
@track_option
@json_option
def resume(folder: Path, workers: int, ray: str | None, track: str | None, as_json: bool) -> None:
    """Finish a RUN (or a benchmark) that was killed; what had finished is not run again."""
    from secateurs.runs.matrix import DATABASE, Bench
    from secateurs.runs.run import Run

    if (folder / DATABASE).is_file():
        finish_bench(Bench(folder), workers, ray, as_json)
    else:
        execute_run(Run(folder), as_json=as_json, track=track)


@main.command()
@click.argument("matrix", type=click.Path(path_type=Path))
@out_option
@click.option("--workers", type=int, default=2, show_default=True, help="worker processes")
@click.option(
    "--ray", metavar="ADDRESS", help="run on a Ray cluster instead: its address, auto or local"
)
@json_option
def bench(matrix: Path, out: Path | None, workers: int, ray: str | None, as_json: bool) -> None:
    """Run MATRIX, a YAML file of methods, tasks, budgets and seeds, and print a leaderboard."""
    from secateurs.runs.matrix import Bench, Matrix

    parsed = Matrix.read(matrix)
    finish_bench(Bench.create(parsed, out or Path("runs") / matrix.stem), workers, ray, as_json)


def finish_bench(made: Any, workers: int, ray: str | None, as_json: bool) -> None:
    """Do the jobs that are left, write the report, print the leaderboard."""
    with_report = can_report()
    do_jobs(made, workers, ray)
    path = write_bench_report(made) if with_report else None
    from secateurs.report.console import leaderboard_table
    from secateurs.report.leaderboard import leaderboard

    board = leaderboard(made.results())
    failures = made.failures()
    if as_json:
        click.echo(json.dumps({"leaderboard": board, "results": made.results(),
                               "failures": failures, "bench": str(made.folder)}))  # fmt: skip
    else:
        Console().print(leaderboard_table(board))
        if made.matrix.about:
            Console().print(made.matrix.about.strip() + "\n", markup=False, highlight=False)
        click.echo(f"bench   {made.folder}")
        click.echo(f"report  {path or 'not written'}")
    for failure in failures:
        click.echo(f"failed  {failure['job']}: {failure['error']}", err=True)
    if failures:
        sys.exit(1)


def do_jobs(made: Any, workers: int, ray: str | None) -> None:
    """The jobs of a benchmark, here or on a cluster, with bars."""
    from secateurs.runs.progress import watching
    from secateurs.runs.workers import run_bench

    with watching(console()) as watch:
        if ray is None:
            run_bench(made, workers, watch)
        else:
            from secateurs.runs.ray_cluster import run_on_ray

            run_on_ray(made, ray, watch)


def write_bench_report(made: Any) -> Path:
    """The report of a benchmark: leaderboard, trade-off, and the best outcome a method."""
    from secateurs.outcome import PLAN, read_plan
    from secateurs.report.html import write_report
    from secateurs.report.leaderboard import leaderboard
    from secateurs.runs.run import environment

    results = made.results()
    timings = {row["cell"]: row.get("timing", {}) for row in results if "cell" in row}
    plans = []
    for cell in made.matrix.cells:
        path = made.cell_folder(cell.identity) / "outcome" / PLAN
        if path.is_file():
            plan = read_plan(path)
            for side, latency in timings.get(cell.identity, {}).items():
                plan[side]["latency"] = latency  # timed after the run, when all were done
            plans.append({**plan, "label": cell.label})
    return write_report(
        made.folder / "report.html",
        title=made.matrix.name,
        intro=made.matrix.about,
        outcomes=plans,
        leaderboard=leaderboard(results),
        recipe=made.matrix.as_yaml(),
        environment=environment(),
    )


@main.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default="demo", show_default=True, help="folder"
)
@click.option(
    "--act",
    type=click.Choice(list(DEMOS)),
    default="digits",
    show_default=True,
    help="what is shown",
)
@click.option("--workers", type=int, default=2, show_default=True, help="worker processes")
@json_option
def demo(out: Path, act: str, workers: int, as_json: bool) -> None:
    """Prune a network in several ways and compare.

    digits: a small network on handwritten digits, pruned to 95 % in five ways. photographs:
    channels of an ImageNet network removed without training (needs the extras vision and
    weights).
    """
    from importlib.resources import files

    from secateurs.runs.matrix import Bench, Matrix

    text = files("secateurs.runs").joinpath(DEMOS[act]).read_text()
    finish_bench(Bench.create(Matrix.parse(text), out), workers, None, as_json)


@main.command(epilog=MODEL_HELP)
@click.argument("base")
@click.argument(
    "deltas", metavar="DELTA...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--data", metavar="DATA", help="gives BASE its sizes, where its name does not")
@out_option
@json_option
def merge(
    base: str, deltas: tuple[Path, ...], data: str | None, out: Path | None, as_json: bool
) -> None:
    """Add to BASE every DELTA, a file or the folder of a run, and write the model."""
    from secateurs.deploy.delta_file import load_delta, shared_seeds
    from secateurs.deploy.merged_folder import save_merged
    from secateurs.zoo.catalog import base_model

    loaded = [load_delta(path) for path in deltas]
    source = {"model": base} if data is None else {"model": base, "data": data}
    folder = save_merged(base_model(base, data), loaded, out or fresh_folder("merge"), source)
    rows = [
        {"delta": str(p), "kept": d.kept, "total": d.total, "p": d.p, "bytes": d.file_bytes}
        for p, d in zip(deltas, loaded, strict=True)
    ]
    seeds = shared_seeds(loaded)
    if as_json:
        found = {"folder": str(folder), "base": loaded[0].base, "deltas": rows}
        click.echo(json.dumps({**found, "shared_seeds": seeds}))
        return
    for row in rows:
        click.echo("delta   {delta}: {kept} of {total} differences, {bytes} bytes".format(**row))
    if seeds:
        click.echo(f"note    deltas of one seed ({seeds[0]}) keep their entries in the same places")
    click.echo(f"merged  {folder}")


# ---------------------------------------------------------------- looking


def _tag_option(axis: str, values: Sequence[str], text: str) -> Callable[[Any], Any]:
    return click.option(f"--{axis}", metavar="VALUE", help=f"{text}: {', '.join(values)}")


@main.command()
@click.argument("pattern", default="*")
@_tag_option("unit", VOCABULARY["unit"], "what is removed")
@_tag_option("when", [f"{k} ({v})" for k, v in WHEN.items()], "when it is removed")
@_tag_option("needs", NEEDS, "what it asks for")
@_tag_option("criterion", VOCABULARY["criterion"], "how units are scored")
@_tag_option("rounds", VOCABULARY["rounds"], "how often")
@json_option
def methods(pattern: str, as_json: bool, **wanted: str | None) -> None:
    """List the methods whose name matches PATTERN (a wildcard), with their papers."""
    found = list_methods(pattern, **{k: v for k, v in wanted.items() if v is not None})
    rows = [method_row(name, cls) for name, cls in found.items()]
    if as_json:
        click.echo(json.dumps(rows, default=str))
        return
    from secateurs.report.console import methods_table

    Console().print(methods_table(rows))


def method_row(name: str, cls: type[Any]) -> dict[str, Any]:
    """What there is to know about a method."""
    return {
        "name": name,
        "kind": kind_of(cls),
        "summary": summary(cls),
        "paper": str(cls.paper) if cls.paper else None,
        "budgets": list(cls.budgets),
        "needs": list(cls.needs),
        "tags": {axis: cls.tags.values(axis) for axis in VOCABULARY},
        "options": [vars(o) for o in options_of(cls)],
    }


def kind_of(cls: type[Any]) -> str:
    """Pruner, TrainingPruner, Procedure, Codec or Selector."""
    from secateurs.method import Codec, Procedure, Pruner, Selector, TrainingPruner

    kinds = (Pruner, TrainingPruner, Procedure, Codec, Selector)
    return next(k.__name__ for k in kinds if issubclass(cls, k))


@main.command(epilog=MODEL_HELP)
@click.argument("model")
@click.option("--data", metavar="DATA", help=DATA_HELP)
@click.option("--latency", is_flag=True, help="also time a forward pass")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="also write a page with a picture of the axes here",
)
@json_option
def inspect(model: str, data: str | None, latency: bool, out: Path | None, as_json: bool) -> None:
    """Show what MODEL is made of: weights that can be pruned, axes that can be shortened,
    parameters, MACs, bytes."""
    from secateurs.parts.costs import count_macs, measure_cost
    from secateurs.parts.prunable import prunable_parameters
    from secateurs.report.inspection import check_page, write_inspection
    from secateurs.runs.run import environment
    from secateurs.zoo.catalog import inspectable

    if out is not None:
        check_page(out)  # before a model is traced for half a minute
    net, inputs, masks = inspectable(model, data)
    params = prunable_parameters(net)
    macs = count_macs(net, inputs)
    rows = [
        {
            "name": name,
            "shape": list(p.shape),
            "weights": p.numel(),
            "kept": int(masks[name].sum()) if name in masks else p.numel(),
            "macs": macs.get(name.rpartition(".")[0], 0),
        }
        for name, p in params.items()
    ]
    cost = measure_cost(net, inputs, masks, with_latency=latency)
    found = {"model": model, "layers": rows, **axes_listing(net, inputs), "cost": cost.as_dict()}
    if out is not None:
        write_inspection(out, found, environment=environment())
    if as_json:
        click.echo(json.dumps(found))
        return
    from secateurs.report.console import axes_table, cost_table, frozen_table, layers_table

    Console().print(layers_table(rows))
    if found["untraced"]:
        console().print(f"no axes: {found['untraced']}")
    else:
        Console().print(axes_table(found["axes"]))
        Console().print(frozen_table(found["frozen"]))
    Console().print(cost_table(found["cost"]))
    if out is not None:
        click.echo(out)


def axes_listing(model: Any, inputs: Any) -> dict[str, Any]:
    """The axes of a model as plain values; ``untraced`` says why there are none."""
    from secateurs.api import axes

    try:
        structure = axes(model, inputs)
    except SecateursError as error:
        nothing = {"parameters": 0, "free_parameters": 0, "macs": 0}
        return {"axes": [], "frozen": [], "unruled": {}, "traced": nothing, "untraced": str(error)}
    free = [
        {
            "name": group.name,
            "role": group.role,
            "size": group.size,
            "granularity": group.granularity,
            "parameters": group.parameters,
            "macs": group.macs,
            "normalized": list(group.normalized),
            "slices": [list(place) for place in group.slices],
        }
        for group in structure.free
    ]
    reasons: dict[str, list[str]] = {}
    for group in structure.values():
        if group.frozen is not None:
            reasons.setdefault(group.frozen, []).append(group.name)
    frozen = [{"reason": r, "axes": len(n), "example": n[0]} for r, n in reasons.items()]
    traced = {
        "parameters": structure.parameters(),
        "free_parameters": structure.free_parameters,
        "macs": structure.macs(),
    }
    return {
        "axes": free,
        "frozen": frozen,
        "unruled": dict(structure.unruled),
        "traced": traced,
        "untraced": "",
    }


@main.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--png", type=click.Path(path_type=Path), help="also write the plots here as PNG")
@json_option
def report(folder: Path, png: Path | None, as_json: bool) -> None:
    """Write the report of a RUN or a benchmark again."""
    from secateurs.runs.matrix import DATABASE, Bench

    is_bench = (folder / DATABASE).is_file()
    path = write_bench_report(Bench(folder)) if is_bench else write_run_report(folder)
    images = write_plots(folder, png) if png is not None else []
    if as_json:
        click.echo(json.dumps({"report": str(path), "png": [str(i) for i in images]}))
        return
    for file in (path, *images):
        click.echo(file)


def write_plots(folder: Path, target: Path) -> list[Path]:
    """The plots of a run or a benchmark as PNG files."""
    from secateurs.outcome import PLAN, read_plan
    from secateurs.report.figures import layer_bars, to_png, trade_off
    from secateurs.report.leaderboard import leaderboard
    from secateurs.runs.matrix import DATABASE, Bench

    if (folder / DATABASE).is_file():
        board = leaderboard(Bench(folder).results())
        return [to_png(trade_off(board), target / "trade-off.png")]
    plan = read_plan(folder / "outcome" / PLAN)
    return [to_png(layer_bars(plan["layers"]), target / "layers.png")]


if __name__ == "__main__":
    main()
