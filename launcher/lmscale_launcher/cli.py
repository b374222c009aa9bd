"""The `lmscale` command: what the verbs take, and errors turned into words and exit codes.

Nothing heavy is imported here; each verb imports what it needs, so `lmscale --help` stays quick.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lmscale import __version__
from lmscale.base.errors import ExitCode, LmscaleError, UsageError
from lmscale_launcher.cli_options import Cluster, Json, Nproc, Overrides, Run, with_cluster
from lmscale_launcher.jobs import verbs

app = typer.Typer(
    help="Train language models so that the result can be trusted.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    """Train language models so that the result can be trusted."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the console script. Ends the process with the verb's exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a verb without a traceback
    try:
        app(args=argv, prog_name="lmscale", obj=argv)
    except LmscaleError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(int(error.exit_code))
    except OSError as error:
        typer.echo(f"error: {error}; start again once it is mended", err=True)
        sys.exit(int(ExitCode.RETRY))


@app.command()
def prepare(  # noqa: PLR0913, PLR0917 one parameter an option
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the corpora.")],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="UTF-8 text, JSON Lines (.jsonl), each also as .gz or .zst; or folders of them.",
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option(help="A tokenizer.json, bytes, or bpe:SIZE trained on the input.")
    ] = "bpe:4096",
    chunk_tokens: Annotated[
        str, typer.Option(metavar="N", help="Tokens a chunk; train.seq_len must divide it.")
    ] = "262144",
    shard_chunks: Annotated[str | None, typer.Option(metavar="N", help="Chunks a shard.")] = None,
    heldout: Annotated[
        str, typer.Option(metavar="SHARE", help="Documents kept out of training; 0 for none.")
    ] = "1%",
    text_key: Annotated[str, typer.Option(help="Key of the text in JSON Lines.")] = "text",
    workers: Annotated[
        str, typer.Option(metavar="N", help="Processes; 0: one for each core.")
    ] = "0",
    as_json: Json = False,
) -> None:
    """Turn text into corpora: OUT/train and OUT/heldout. Killed? The same command goes on."""
    _hand_off(context)


@app.command()
def train(
    run: Run,
    overrides: Overrides = None,
    nproc: Nproc = None,
    cluster: Cluster = None,
) -> None:
    """Train a run, or go on with it from its newest checkpoint."""
    from lmscale_launcher.train import train as run_train

    _configure_log()
    raise typer.Exit(run_train(run, with_cluster(overrides, cluster), nproc))


@app.command()
def plan(
    run: Run,
    overrides: Overrides = None,
    nproc: Nproc = None,
    cluster: Cluster = None,
    data: Annotated[bool, typer.Option("--data", help="List the samples of each step.")] = False,
    steps: Annotated[
        str | None, typer.Option(metavar="A:B", help="Steps of --data, both included, from 1.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a run will be: steps, tokens, batches, epochs; or which sample is read where."""
    from lmscale.config.run_file import load
    from lmscale_launcher import plan as planning
    from lmscale_launcher.jobs.job_plan import unstaged

    if steps is not None and not data:
        raise UsageError("--steps belongs to --data")
    given = with_cluster(overrides, cluster)
    given += [f"cluster.ranks_per_node={nproc}"] if nproc else []
    cfg, env = load(run, given), dict(os.environ)
    if data:
        show = planning.as_json if as_json else planning.row_in_words
        for row in planning.data_rows(cfg, steps, env):
            sys.stdout.write(show(row) + "\n")
        return
    facts = planning.facts(cfg, env)
    facts["warnings"] += [{"key": w.path, "fact": w.fact, "hint": w.hint} for w in unstaged(cfg)]
    text = planning.as_json(facts) if as_json else "\n".join(planning.in_words(facts))
    sys.stdout.write(text + "\n")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Corpus, checkpoint or run folder.")],
    as_json: Json = False,
) -> None:
    """Read every byte and hold it against its digest. 65 and a line a problem where one is wrong."""
    import json

    from lmscale_launcher.read_progress import byte_line
    from lmscale_launcher.verify import verify as run_verify

    with byte_line("verify", sys.stderr) as progress:
        verdict = run_verify(path, progress)
    if as_json:
        facts = {"path": str(path), "kind": verdict.kind, "sound": not verdict.problems}
        body = {**facts, "problems": verdict.problems, "notes": verdict.notes}
        sys.stdout.write(json.dumps(body) + "\n")
    else:
        for note in verdict.notes:
            sys.stdout.write(f"note: {note}\n")
        for problem in verdict.problems:
            sys.stdout.write(f"{problem}\n")
        if not verdict.problems:
            sys.stdout.write(f"{path}: {verdict.kind}, every byte is sound\n")
    raise typer.Exit(ExitCode.DATA if verdict.problems else ExitCode.DONE)


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder or a checkpoint.")
    ],
    corpus: Annotated[
        list[Path] | None, typer.Option(help="Held-out corpus; again for more. Default: the run's.")
    ] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Of each corpus.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Samples a forward.")] = None,
    as_json: Json = False,
) -> None:
    """Score a checkpoint on held-out corpora, each sample once."""
    _hand_off(context)


@app.command()
def generate(  # noqa: PLR0913, PLR0917 one parameter an option
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint or a run folder.")
    ],
    max_new: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids to continue, e.g. 1,2,3.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end.")] = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt with a trained model."""
    if (prompt is None) == (tokens is None):
        raise UsageError("give exactly one of --prompt and --tokens")
    _hand_off(context)


@app.command()
def doctor(
    cluster: Annotated[
        str | None, typer.Option(help="Look at a cluster, by its name in configs/clusters.")
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", min=1, help="Check N idle nodes of that Slurm cluster, too."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine and its cluster can run, and what to do about the rest."""
    from lmscale_launcher.doctor.doctor import doctor as run_doctor

    raise typer.Exit(run_doctor(cluster=cluster, as_json=as_json, nodes=nodes or 0))


for verb in (verbs.submit, verbs.status, verbs.logs, verbs.stop, verbs.resume):
    app.command()(verb)


def _hand_off(context: typer.Context) -> None:
    """Pass the words after the verb on as they are: typer has read them only to check and to help."""
    from lmscale_launcher.handoff import hand_off

    verb, *argv = context.obj
    hand_off(verb, argv)


def _configure_log() -> None:
    from lmscale.base.log import configure
    from lmscale.base.world import World

    configure(World())


if __name__ == "__main__":
    main()
