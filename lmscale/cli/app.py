"""The verbs, their arguments and options. What a verb does is imported when it runs.

`lmscale --help` and a config error load neither numpy nor torch.
"""

import signal
from pathlib import Path
from typing import Annotated

import typer

from lmscale import __version__
from lmscale.base.errors import UsageError
from lmscale.cli.shared_options import (
    Cluster,
    DryRun,
    Json,
    Nproc,
    Overrides,
    RunFile,
    RunName,
    with_cluster,
)

app = typer.Typer(
    help="Train language models so that the result can be trusted.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help costs 0.1 s of CPU
)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"lmscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Train language models so that the result can be trusted."""


# ---- corpora -------------------------------------------------------------------------------------


@app.command()
def prepare(  # noqa: PLR0913, PLR0917 one parameter per option
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the corpora.")],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT",
            help="UTF-8 text (one document per file) or JSON Lines (.jsonl, one document per line), "
            "each also as .gz or .zst; or folders of such files.",
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="FILE|bytes|bpe:SIZE",
            help="A tokenizer.json, plain bytes, or a byte-level BPE trained on the input.",
        ),
    ] = "bpe:4096",
    chunk_tokens: Annotated[
        str, typer.Option(metavar="N", help="Tokens per chunk; train.seq_len must divide it.")
    ] = "262144",
    shard_chunks: Annotated[str, typer.Option(metavar="N", help="Chunks per shard.")] = "256",
    heldout: Annotated[
        str,
        typer.Option(
            metavar="SHARE",
            help="Share of the documents that is kept out of training (every n-th document); 0 for none.",
        ),
    ] = "1%",
    text_key: Annotated[
        str, typer.Option(metavar="KEY", help="Key of the text in JSON Lines.")
    ] = "text",
    workers: Annotated[
        str, typer.Option(metavar="N", help="Number of processes; 0: one per core.")
    ] = "0",
    as_json: Json = False,
) -> None:
    """Turn text into tokenized corpora: OUT/train, OUT/heldout.

    The result is the same for any number of workers. After an interruption the same command resumes.
    """
    from lmscale.prepare.command import parse_options, prepare_verb

    options = parse_options(
        tokenizer=tokenizer,
        chunk_tokens=chunk_tokens,
        shard_chunks=shard_chunks,
        heldout=heldout,
        text_key=text_key,
        workers=workers,
    )
    raise typer.Exit(prepare_verb(out, inputs, options, as_json=as_json))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Corpus, checkpoint or run folder.")],
    as_json: Json = False,
) -> None:
    """Read every byte of a folder and compare it with its digest.

    Exit code 65, with one line per problem, where something is damaged.
    """
    from lmscale_launcher.verify import verify_verb

    raise typer.Exit(verify_verb(path, as_json=as_json))


# ---- one run -------------------------------------------------------------------------------------


@app.command()
def train(
    context: typer.Context,
    run: RunFile,
    overrides: Overrides = None,
    nproc: Nproc = None,
    cluster: Cluster = None,
) -> None:
    """Train a run, or resume it from its newest checkpoint."""
    if context.obj is not None:  # this process is one rank: see entry.py
        from lmscale.train.main import main as run_rank

        raise typer.Exit(run_rank(run, with_cluster(overrides, cluster), context.obj))
    from lmscale_launcher.train import train as supervise_run

    _configure_log()
    raise typer.Exit(supervise_run(run, with_cluster(overrides, cluster), nproc))


@app.command()
def plan(
    run: RunFile,
    overrides: Overrides = None,
    nproc: Nproc = None,
    cluster: Cluster = None,
    data: Annotated[bool, typer.Option("--data", help="List the samples of each step.")] = False,
    steps: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Steps to list with --data, from 1, both included."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show steps, memory and data of a run without starting it."""
    from lmscale_launcher.plan import plan_verb

    if steps is not None and not data:
        raise UsageError("--steps belongs to --data")
    given = with_cluster(overrides, cluster)
    given += [f"cluster.ranks_per_node={nproc}"] if nproc else []
    plan_verb(run, given, data=data, steps=steps, as_json=as_json)


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder or a checkpoint.")
    ],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help="A held-out corpus; may be repeated. Default: those of the run."),
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option(min=1, help="Score at most this many samples of each corpus.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Samples per forward pass.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a checkpoint on held-out corpora."""
    _end_by_keyboard_interrupt()
    from lmscale.train.commands import eval_verb

    raise typer.Exit(
        eval_verb(
            checkpoint,
            corpora=corpus or [],
            max_samples=max_samples,
            micro_batch_size=micro_batch,
            as_json=as_json,
        )
    )


@app.command()
def generate(  # noqa: PLR0913, PLR0917 one parameter per option
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint or a run folder.")
    ],
    max_new: Annotated[int, typer.Option(min=1, help="Generate at most this many tokens.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids to continue, e.g. 1,2,3.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0: always the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue after an end of sequence.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt with a trained model."""
    if (prompt is None) == (tokens is None):
        raise UsageError("give exactly one of --prompt and --tokens")
    _end_by_keyboard_interrupt()
    from lmscale.train.commands import generate_verb

    raise typer.Exit(
        generate_verb(
            checkpoint,
            prompt=prompt,
            tokens=tokens,
            max_new=max_new,
            temperature=temperature,
            seed=seed,
            ignore_eos=ignore_eos,
            as_json=as_json,
        )
    )


@app.command()
def config(
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="A key or a section, e.g. optim.lr or optim."),
    ] = None,
) -> None:
    """Show the keys of a run file with type, default and meaning."""
    from lmscale.config.reference import reference_text

    typer.echo(reference_text(key), nl=False)


# ---- jobs ----------------------------------------------------------------------------------------


@app.command()
def submit(
    run: RunFile,
    overrides: Overrides = None,
    cluster: Cluster = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Start a run in the background: here, by mpirun or Slurm."""
    from lmscale_launcher.jobs.submit import submit as submit_run

    _configure_log()
    given = with_cluster(overrides, cluster)
    raise typer.Exit(submit_run(run, given, dry_run=dry_run, as_json=as_json))


@app.command()
def status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="A run folder, or its name in runs/. Default: all runs in runs/."
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Show the state of a run, or of all runs in runs/."""
    from lmscale_launcher.jobs.status import status as show_status

    raise typer.Exit(show_status(run, watch=watch, as_json=as_json))


@app.command()
def logs(
    run: RunName,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Keep printing new lines.")
    ] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Show only this rank.")] = None,
    as_json: Json = False,
) -> None:
    """Print the output of the ranks of a run."""
    from lmscale_launcher.jobs.logs import logs as show_logs

    raise typer.Exit(show_logs(run, follow=follow, rank=rank, as_json=as_json))


@app.command()
def stop(
    run: RunName,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without saving.")] = False,
    as_json: Json = False,
) -> None:
    """Save and stop a run, and wait until it has ended.

    After that only `lmscale resume`, or `lmscale train` by hand, starts it again.
    """
    from lmscale_launcher.jobs.stop import stop as stop_run

    raise typer.Exit(stop_run(run, now=now, as_json=as_json))


@app.command()
def resume(
    run: RunName,
    overrides: Overrides = None,
    cluster: Cluster = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Submit a run again that was stopped, failed or cancelled."""
    from lmscale_launcher.jobs.resume import resume as resume_run

    _configure_log()
    given = with_cluster(overrides, cluster)
    raise typer.Exit(resume_run(run, given, dry_run=dry_run, as_json=as_json))


# ---- this machine --------------------------------------------------------------------------------


@app.command()
def doctor(
    cluster: Annotated[
        str | None, typer.Option(help="Check a cluster, by its name in configs/clusters.")
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", min=1, help="Check N idle nodes of that Slurm cluster, too."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine or a cluster, and explain how to fix it."""
    from lmscale_launcher.doctor.doctor import doctor as check

    raise typer.Exit(check(cluster=cluster, as_json=as_json, nodes=nodes or 0))


@app.command(hidden=True)
def probe(part: Annotated[str, typer.Argument(metavar="PART")]) -> None:
    """Print facts about a library as JSON; run by `lmscale doctor`."""
    from lmscale.distributed.probe import main as run_probe

    raise typer.Exit(run_probe([part]))


@app.command(hidden=True)
def stage(
    run: RunFile,
    node: Annotated[int, typer.Option(min=0)],
    nodes: Annotated[int, typer.Option(min=1)],
    ranks_per_node: Annotated[int, typer.Option(min=1)],
    overrides: Overrides = None,
) -> None:
    """Fill the cache of a node; run by the supervisor before ranks start."""
    from lmscale_launcher.stage import StagingTarget, stage_verb

    target = StagingTarget(node, nodes, ranks_per_node)
    raise typer.Exit(stage_verb(run, overrides or [], target))


def _end_by_keyboard_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, so that files are closed and the process ends with 130."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _configure_log() -> None:
    from lmscale.base.log import configure
    from lmscale.base.world import World

    configure(World())
