"""One command of Slurm: run with a time limit and a clean environment; what went wrong, in words."""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.jobs.environment import scrubbed
from lmscale.errors import ConfigError, Problem, RetryableError

# Slurm's own commands give up after 9 to 10 s where nobody answers (MessageTimeout, measured).
TIMEOUT_S = 10.0
# Twice, for a look at the newest job before a submit, is still within 15 s.
PING_TIMEOUT_S = 6.0
# sbatch is not given up lightly: it may have queued the job before its answer was lost.
SUBMIT_TIMEOUT_S = 30.0

# SQUEUE_PARTITION and its like are a user's habits: they would hide jobs, or ask before each scancel.
_HABIT = re.compile(r"(SQUEUE|SACCT|SINFO|SCANCEL|SCONTROL)_")
_DOWN = re.compile(
    r"Unable to contact slurm controller|Zero Bytes were transmitted|Socket timed out|Connection refused"
    r"|Connection timed out|in standby mode|Slurmctld\S* at \S+ is DOWN|Rate limit exceeded"
    r"|Failed while looking for jobs|Unexpected message received|Transport endpoint",
    re.IGNORECASE,
)
_CLOCKS = re.compile(r"(?:Expired|Rewound) credential", re.IGNORECASE)
_MUNGE = re.compile(
    r"Munge (?:encode|decode) failed[^\n]*|auth_g_\w+: [^\n]*|authentication error|Invalid credential",
    re.IGNORECASE,
)
_NO_CONF = re.compile(
    r"(?:cannot stat file|Unable to process configuration file|ClusterName needs to be specified"
    r"|Could not establish a configuration source|Unable to establish configuration source"
    r"|resolve_ctls_from_dns_srv)[^\n]*",
    re.IGNORECASE,
)
_VERSIONS = re.compile(r"Incompatible versions of client and server", re.IGNORECASE)


class NoAnswer(RetryableError):
    """Slurm could not be asked. Nothing is known of any job: least of all that it has ended."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """The first telling line, without the name of the command."""
        for line in (*self.err.splitlines(), *self.out.splitlines()):
            told = re.sub(r"^\w+: (?:error: |fatal: )?", "", line).strip()
            if told:
                return told
        return f"exit code {self.code} without a word"


def ask(*argv: str, timeout_s: float = TIMEOUT_S) -> Answer:
    """Run a command that only asks. Raises NoAnswer, or ConfigError where there is no Slurm."""
    env = {name: value for name, value in scrubbed(os.environ).items() if not _HABIT.match(name)}
    env |= {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
    return _run(argv, timeout_s=timeout_s, env=env)


def sbatch(argv: Sequence[str], *, cwd: Path) -> Answer:
    """Queue a script, or only try to (--test-only). The job inherits this process' environment, scrubbed."""
    limit = TIMEOUT_S if "--test-only" in argv else SUBMIT_TIMEOUT_S
    return _run(argv, timeout_s=limit, env=scrubbed(os.environ), cwd=cwd)


def ping() -> None:
    """Raise NoAnswer where no controller answers: in milliseconds where its machine refuses."""
    answer = ask("scontrol", "ping", timeout_s=PING_TIMEOUT_S)
    if not re.search(r"\bis UP\b", answer.out, re.IGNORECASE) and answer.code != 0:
        raise NoAnswer(_down(answer.words))


def _run(
    argv: Sequence[str], *, timeout_s: float, env: dict[str, str], cwd: Path | None = None
) -> Answer:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, env=env, cwd=cwd,
            check=False, start_new_session=True,  # a Ctrl-C must not end sbatch when the job is queued already
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ConfigError([_missing(argv[0], cwd)]) from error
    except PermissionError as error:
        fact = f"{argv[0]} may not be run here ({error.strerror})"
        raise ConfigError([Problem("cluster.kind", fact, "look at its permissions")]) from error
    except subprocess.TimeoutExpired as error:
        told = (error.stderr or b"").decode(errors="replace")
        _raise_for(argv, told)
        raise NoAnswer(_hangs(argv, timeout_s)) from error
    answer = Answer(
        tuple(argv), done.returncode, done.stdout.decode(errors="replace"),
        done.stderr.decode(errors="replace"),
    )  # fmt: skip
    if answer.code != 0:
        _raise_for(argv, answer.err)
    return answer


def _raise_for(argv: Sequence[str], err: str) -> None:
    """Raise where Slurm could not even be asked; other refusals are the caller's to judge."""
    if match := _NO_CONF.search(err):
        hint = "set SLURM_CONF to the site's slurm.conf, or submit from a login node of the cluster"
        raise ConfigError([Problem("cluster.kind", f"Slurm is not set up here: {match[0]}", hint)])
    if _CLOCKS.search(err):
        raise NoAnswer(
            f"{argv[0]}: the clocks of this machine and of Slurm's controller differ by minutes\n"
            "  hint: set this machine's clock (chronyd or ntpd), then try again"
        )
    if match := _MUNGE.search(err):
        raise NoAnswer(
            f"{argv[0]} was not let in: {match[0].strip()}\n"
            "  hint: munged must run here with the cluster's key: systemctl status munge"
        )
    if _VERSIONS.search(err):
        raise NoAnswer(
            f"{argv[0]} and Slurm's controller have incompatible versions\n"
            "  hint: use the commands that the site installed, e.g. on a login node"
        )
    if match := _DOWN.search(err):
        raise NoAnswer(_down(match[0]))


def _down(told: str) -> str:
    return (
        f"Slurm's controller does not answer ({told})\n"
        "  hint: nothing is lost: jobs go on running meanwhile; try again when `scontrol ping` says UP"
    )


def _hangs(argv: Sequence[str], timeout_s: float) -> str:
    if argv[0] == "sbatch" and "--test-only" not in argv:
        hint = "the job may have been queued all the same: look with `squeue --me` before you try again"
    else:
        hint = "the controller hangs or has too much to do: `scontrol ping`; try again later"
    return f"{argv[0]} did not answer within {timeout_s:.0f} s\n  hint: {hint}"


def _missing(program: str, cwd: Path | None) -> Problem:
    if cwd is not None and not cwd.is_dir():
        return Problem("", f"the working directory {cwd} is gone", "make it, or go elsewhere")
    hint = (
        "submit from a login node of the cluster, or install Slurm's client here (Debian, Ubuntu: "
        "apt-get install slurm-client) with the site's slurm.conf and munge key; "
        "without Slurm: cluster.kind=local"
    )
    return Problem("cluster.kind", f"no Slurm on this machine: there is no command {program}", hint)
