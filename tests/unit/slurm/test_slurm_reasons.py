"""Slurm's reasons in words, and which of them no waiting can end."""

from pathlib import Path

import pytest

from lmscale_launcher.slurm import slurm_messages as reasons
from lmscale_launcher.slurm.slurm_messages import reason

NAMES = (Path(__file__).parents[2] / "golden/slurm-answers/reasons.txt").read_text().split()


@pytest.mark.parametrize("name", NAMES)
def test_every_reason_of_slurm_has_words_of_ours(name: str) -> None:
    why = reason(name)
    assert why.name == name
    assert why.words != name
    assert bool(why.words) == (name != "None")
    assert "_" not in why.words


@pytest.mark.parametrize(
    ("name", "words", "key"),
    [
        ("PartitionNodeLimit", "more nodes than the partition has or allows", "cluster.nodes"),
        ("PartitionTimeLimit", "a longer time limit than the partition allows", "cluster.time_limit"),
        ("QOSMaxWallDurationPerJobLimit", "more time of a job than its QOS allows", "cluster.time_limit"),
        ("QOSMaxNodePerJobLimit", "more nodes of a job than its QOS allows", "cluster.nodes"),
        ("AssocMaxGRESPerNode", "more GPUs of a node than its account or user allows", "cluster.gpus_per_node"),
        ("AssocMaxCpuMinutesPerJobLimit", "more minutes of cores of a job than its account or user allows",
         "cluster.time_limit"),
        ("QOSMinGRES", "less GPUs than its QOS requires", "cluster.gpus_per_node"),
        ("DependencyNeverSatisfied", "it waits for a job that did not end as required, for ever",
         "cluster.slurm.sbatch"),
    ],
)  # fmt: skip
def test_these_wait_for_ever(name: str, words: str, key: str) -> None:
    why = reason(name)
    assert (why.words, why.key, why.never) == (words, key, True)


@pytest.mark.parametrize(
    "name",
    [
        "None", "", "Resources", "Priority", "Reservation", "ReqNodeNotAvail", "BeginTime", "JobHeldAdmin",
        "JobHeldUser", "Dependency", "Licenses", "PartitionDown", "AssocMaxJobsLimit", "AssocGrpCpuLimit",
        "QOSGrpGRES", "QOSMaxCpuPerUserLimit", "QOSMaxJobsPerUserLimit", "MaxGRESPerAccount", "Prolog",
        "Nodes_required_for_job_are_DOWN,_DRAINED", "SomethingNew",
    ],
)  # fmt: skip
def test_these_may_only_have_to_wait(name: str) -> None:
    assert not reason(name).never


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(Resources)", "it waits for free nodes"),
        (
            "ReqNodeNotAvail, UnavailableNodes:n[3-4]",
            "nodes that it needs are down, drained or reserved (maintenance?): n[3-4]",
        ),
        ("launch_failed_requeued_held", "launch failed requeued held"),
        ("Nodes required for job are DOWN", "Nodes required for job are DOWN"),
    ],
)
def test_what_slurm_adds_is_kept(text: str, words: str) -> None:
    assert reason(text).words == words


def test_no_state_stands_for_two_things() -> None:
    tables = (reasons.WAITING, reasons.AT_WORK, reasons.ENDED, reasons.ELSEWHERE)
    assert sum(map(len, tables)) == len({name for table in tables for name in table})
