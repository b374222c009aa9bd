"""From a job to the text of its batch script."""

import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.base.errors import ConfigError
from lmscale.config.run_file import cluster_dir
from lmscale_launcher.slurm.script import (
    container_command,
    mounts,
    quoted,
    quoted_for_sbatch,
    render,
    sbatch_options,
    srun_options,
)
from tests.support.slurm_plans import CACHE, CORPUS, plan, plans

GOLDEN = Path(__file__).parents[2] / "golden" / "slurm"
TEMPLATE = cluster_dir() / "slurm" / "job.sh"
LIBRARY = cluster_dir() / "slurm" / "job_lib.sh"
NAMES = sorted(plans())
# What a run file may hold: its check refuses control characters.
printable = st.text(st.characters(exclude_categories=("Cs",)).filter(str.isprintable))


@pytest.mark.parametrize("name", NAMES)
def test_the_script_is_the_golden_one(name: str) -> None:
    golden = GOLDEN / f"{name}.sh"
    assert render(plans()[name]) == golden.read_text(encoding="utf-8"), (
        f"if the change is meant: {sys.executable} {__file__}"
    )


def test_no_golden_file_is_left_over() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.sh")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_bash_can_read_the_script(name: str) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=render(plans()[name]), capture_output=True, text=True, timeout=20,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("NOT CHECKED: shellcheck is missing; apt-get install shellcheck")
    files = [*sorted(GOLDEN.glob("*.sh")), LIBRARY]
    done = subprocess.run(
        ["shellcheck", *files], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@settings(max_examples=40, deadline=None)
@given(st.lists(printable, max_size=6))
def test_bash_reads_back_every_quoted_text(texts: list[str]) -> None:
    script = f"printf '%s\\0' end {' '.join(map(quoted, texts))}"
    done = subprocess.run(["bash", "-uc", script], capture_output=True, timeout=20, check=True)
    assert done.stdout.decode().split("\0") == ["end", *texts, ""]


def read_like_sbatch(line: str, *, quotes: str) -> list[str]:
    """How sbatch splits the rest of an #SBATCH line; versions before about 18 knew double quotes only."""
    words, word, started, quote, escaped = [], "", False, "", False
    for letter in line:
        if escaped:
            word, escaped = word + letter, False
        elif letter == "\\":
            escaped = started = True
        elif letter in quotes and quote in ("", letter):
            quote, started = ("" if quote else letter), True
        elif letter.isspace() and not quote:
            words += [word] if started else []
            word, started = "", False
        elif letter == "#" and not quote:
            break
        else:
            word, started = word + letter, True
    return words + ([word] if started else [])


@pytest.mark.parametrize("quotes", ['"', "\"'"])
@given(texts=st.lists(printable.filter(lambda text: text != ""), max_size=4))
def test_sbatch_reads_back_every_quoted_text(quotes: str, texts: list[str]) -> None:
    line = " ".join(map(quoted_for_sbatch, texts))
    assert read_like_sbatch(line, quotes=quotes) == texts


@settings(max_examples=60)
@given(text=printable.filter(lambda text: text.strip() != ""))
def test_any_value_stays_on_its_line_of_the_script(text: str) -> None:
    cluster = {"slurm": {"partition": text, "exclude": [text]}}
    lines = render(plan(cluster=cluster)).splitlines()
    found = [line for line in lines if line.startswith("#SBATCH ") and "--partition=" in line]
    assert len(found) == 1
    words = read_like_sbatch(found[0].removeprefix("#SBATCH "), quotes="\"'")
    assert words == [f"--partition={text}"]
    assert f"excluded={quoted(text)}  # nodes that the run file excludes" in lines


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (lambda text: text.replace("@{setup}", ""), "lacks @{setup}"),
        (lambda text: text + "@{hostname}\n", "unknown @{hostname}"),
        (lambda text: text.replace("@{values}", "@{value}"), "lacks @{values}"),
    ],
)
def test_a_template_with_another_set_of_placeholders_is_refused(template, said: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.slurm\.template") as caught:
        render(plan(), template(TEMPLATE.read_text()))
    assert said in str(caught.value)


def test_a_site_names_its_own_template(tmp_path: Path) -> None:
    own = tmp_path / "own.sh"
    own.write_text(TEMPLATE.read_text() + "# ours\n")
    changed = plan(cluster={"slurm": {"template": "own.sh"}}, workdir=tmp_path)
    assert render(changed).endswith("# ours\n")
    own.unlink()
    with pytest.raises(ConfigError, match=r"own\.sh cannot be read"):
        render(changed)


def test_what_a_value_holds_is_never_template_code() -> None:
    text = render(plan(cluster={"slurm": {"partition": "@{setup}"}}, env={"A": "@{command}"}))
    assert '#SBATCH "--partition=@{setup}"' in text
    assert "export A='@{command}'" in text


@pytest.mark.parametrize(
    "entry", ["--array=1-3", "-a 1-3", "-o x.log", "--output=x", "-N4", "--nodes 4", "--wrap=x",
              "--signal=INT@3", "--no-requeue", "-D /tmp", "--wait", "-W", "-M other", "--clusters=other"],
)  # fmt: skip
def test_options_that_the_script_relies_on_are_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.slurm\.sbatch"):
        sbatch_options(plan(cluster={"slurm": {"sbatch": [entry]}}))


@pytest.mark.parametrize("key", ["sbatch", "srun", "prolog", "modules"])
def test_an_open_quote_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"cluster\.slurm\.{key}"):
        render(plan(cluster={"slurm": {key: ["--x='a"]}}))


@pytest.mark.parametrize(
    ("seconds", "text"), [(60, "0-00:01:00"), (86_400, "1-00:00:00"), (100_000, "1-03:46:40")]
)
def test_the_time_limit_is_said_to_the_second(seconds: int, text: str) -> None:
    cluster = {"time_limit": seconds, "slurm": {"signal_lead": 30}}
    assert f"--time={text}" in sbatch_options(plan(cluster=cluster))


def test_nothing_in_the_log_path_is_replaced_by_sbatch() -> None:
    options = sbatch_options(plan(Path("/runs/50%j")))
    assert "--output=/runs/50%%j/logs/job-1.log" in options
    options = sbatch_options(plan(Path("/runs/a\\b%j")))
    assert "--output=/runs/a\\\\b%j/logs/job-1.log" in options


def test_an_elastic_job_asks_for_nodes_and_not_for_tasks() -> None:
    cluster = {"slurm": {"launch": "rank", "cpus_per_task": 3}}
    elastic = plan(cluster=cluster, nodes=4, min_nodes=2)
    asked = sbatch_options(elastic)
    assert "--nodes=2-4" in asked
    assert "--cpus-per-task=6" in asked
    assert not any("ntasks" in option for option in asked)
    assert "--cpus-per-task=3" in srun_options(elastic)
    assert "--cpus-per-task=3" in sbatch_options(plan(cluster=cluster))


def test_a_container_sees_the_run_its_data_and_the_working_folder() -> None:
    seen = mounts(plan(cluster={"slurm": {"container": {"image": "i"}}}))
    assert seen == [f"{p}:{p}" for p in (CORPUS, "/home/me/work", CACHE, "/shared/runs/seven")]


def test_a_folder_inside_a_mount_of_the_site_is_not_mounted_again() -> None:
    container = {"image": "i", "mounts": ["/fast:/local:rw", "/shared"]}
    seen = mounts(plan(cluster={"slurm": {"container": container}}))
    assert seen == [
        "/fast:/local:rw",
        "/shared",
        f"{CORPUS}:{CORPUS}",
        "/home/me/work:/home/me/work",
    ]


def test_a_path_that_no_mount_can_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="colon or a comma"):
        mounts(plan(Path("/runs/a:b"), cluster={"slurm": {"container": {"image": "i"}}}))


@pytest.mark.parametrize(
    "changes",
    [
        {"run_dir": Path("/runs/a\n#SBATCH --uid=root")},
        {"workdir": Path("/home/me/\x1b[1m")},
        {"env": {"A": "b\nc"}},
        {"python": "/opt/\udcff/python"},
    ],
)
def test_a_control_character_of_a_path_never_reaches_the_script(changes) -> None:
    with pytest.raises(ConfigError, match="control character"):
        render(plan(**changes))


def test_apptainer_gets_gpus_only_where_there_are_some() -> None:
    cluster = {"slurm": {"container": {"kind": "apptainer", "image": "i"}}}
    assert "--nv" in container_command(plan(cluster=cluster, gpus_per_node=1))
    assert "--nv" not in container_command(plan(cluster=cluster))


def test_supervisors_get_the_sites_environment_by_themselves_and_ranks_by_export() -> None:
    env = {"NCCL_DEBUG": "a b"}
    assert "NCCL_DEBUG" not in render(plan(cluster={"env": env}))
    assert "export NCCL_DEBUG='a b'\n" in render(
        plan(cluster={"env": env, "slurm": {"launch": "rank"}})
    )


def test_no_word_of_the_template_is_beyond_ascii() -> None:
    """Batch scripts are read in whatever locale a node has."""
    for path in (TEMPLATE, LIBRARY):
        assert set(path.read_text(encoding="utf-8")) <= set(string.printable)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_has_at_most_eighty_lines(name: str) -> None:
    assert len(render(plans()[name]).splitlines()) <= 80


def test_a_template_of_the_time_before_the_library_is_refused_with_the_reason() -> None:
    earlier = "run=@{run_dir}\nrequeue=@{requeue}\nmax_restarts=@{max_restarts}\n"
    with pytest.raises(ConfigError, match="decisions are in a library now"):
        render(plan(), earlier)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.sh"):
        old.unlink()
    for title, job in plans().items():
        (GOLDEN / f"{title}.sh").write_text(render(job), encoding="utf-8")
