"""Jobs that live through faults of a real cluster, and end as a run that nobody disturbed.

The faults share runs: each costs the time that Slurm needs to notice it.
"""

import time

from conftest import STEPS, User, losses_agree

from tests.support.jobs import Job
from tests.support.testbed import Testbed, wait_for

# Other numbers of ranks sum in another order. Measured in fp64, 2 against 3 ranks over these steps: 4e-16.
WITHIN = 1e-12
MORE = 30  # steps between one fault and the next: beyond a checkpoint


def finished_like(user: User, undisturbed: Job) -> None:
    """Done, with the losses and samples of the undisturbed run: each sample once, none lost."""
    said = user.wait_state("finished", "failed", timeout_s=240)
    assert said["state"] == "finished", f"{said}\n{user.tail()}"
    losses_agree(user.lines(), undisturbed.lines(), WITHIN)
    assert user.trace() == undisturbed.trace()
    assert len(user.trace()) == STEPS * 8


def test_fewer_nodes_and_back(user: User, whole: Testbed, undisturbed: Job) -> None:
    """Two power cuts, that of rank 0's node among them; then the time limit, and all nodes again."""
    cache = f"data.cache_dir={whole.root}/local/cache"  # each node has its own disk there
    elastic = ["cluster.nodes=4", "cluster.min_nodes=2", "cluster.ranks_per_node=1", cache]
    job = user.submit(*elastic)
    user.wait_step(MORE)
    assert len(user.hosts()) == 4

    lost = user.hosts()[-1]
    whole.power_off(lost)
    user.wait_start(2)
    assert len(user.hosts()) == 3
    assert lost not in user.hosts()
    user.wait_step(user.step() + MORE)

    first = user.hosts()[0]
    whole.power_off(first)
    user.wait_start(3)
    assert len(user.hosts()) == 2
    assert not {lost, first} & set(user.hosts())
    user.wait_step(user.step() + MORE)

    for node in (lost, first):
        whole.power_on(node)
    whole.wait_idle([lost, first])
    end_soon(whole, job)
    user.wait_start(4)
    whole.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # a requeue keeps the short one
    assert len(user.hosts()) == 4
    saved = user.events("stop") or user.events("exit")
    assert saved, "the time limit's signal made it save"
    finished_like(user, undisturbed)
    assert any((whole.root / "nodes" / node / "cache").is_dir() for node in whole.nodes)


def end_soon(bed: Testbed, job: str) -> None:
    """Bring a job's time limit so near that its signal comes within a minute, as by an operator."""
    elapsed = bed.run("squeue", "-h", "-j", job, "-o", "%M").strip()  # [hours:]minutes:seconds
    minutes = sum(int(part) * 60**i for i, part in enumerate(reversed(elapsed.split(":")))) // 60
    bed.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")


def test_cuts_preemption_and_scancel(user: User, whole: Testbed, undisturbed: Job) -> None:
    """Controller killed, preempted, network cut, cancelled and resumed: 2 nodes x 2 ranks."""
    job = user.submit("cluster.slurm.partition=scav")
    user.wait_step(MORE)

    whole.kill_controller()
    before = user.step()
    user.wait_step(before + MORE)  # it needs no controller to train
    assert user.status()["state"] == "running", "no answer from Slurm is no end of the run"
    whole.start_controller()
    assert user.starts() == user.starts()[:1]

    urgent = ["sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null"]
    whole.run(*urgent, "--wrap", "srun sleep 12")
    user.wait_start(2)
    assert "saved" in user.log()
    user.wait_step(user.step() + MORE)

    cut = user.hosts()[-1]
    whole.cut_network(cut)
    user.wait_start(3)
    user.wait_step(user.step() + MORE)
    whole.join_network(cut)

    saved = [event["step"] for event in user.events("save")]
    whole.run("scancel", job)
    said = user.wait_state("cancelled", "stopped", "failed")
    assert said["state"] != "failed", said
    assert user.step() - max(saved) <= 20 + MORE  # checkpoints come every 20 steps
    time.sleep(8)  # longer than a requeue takes
    assert not user.hosts(), "a cancelled job stays away"
    user.must("resume", user.run_dir)
    finished_like(user, undisturbed)


def test_an_orphan_is_overtaken(user: User, whole: Testbed, undisturbed: Job) -> None:
    """slurmd is killed and its ranks go on: the new start goes on, the old one ends with 87."""
    user.submit("cluster.nodes=1")
    user.wait_step(MORE)
    node = user.hosts()[0]
    by_hand = user.do(
        "train", f"{user.name}.yaml", "--cluster", "testbed", "cluster.nodes=1", timeout=120
    )
    assert by_hand.returncode == 78, by_hand.stderr
    assert f"on {node}" in by_hand.stderr
    again = user.do("submit", f"{user.name}.yaml", "--cluster", "testbed", "cluster.nodes=1")
    assert again.returncode == 78, again.stderr

    orphans = whole.pids(node, "lmscale train")
    assert orphans
    whole.kill_daemon(node)
    user.wait_start(2)
    assert user.hosts() != [node]
    wait_for(lambda: not whole.pids(node, "lmscale train"), 120, "the orphan has ended")
    assert "has taken over" in user.all_logs()
    finished_like(user, undisturbed)
    older, newer = (start["start"] for start in user.starts()[:2])
    taken = next(event["time"] for event in user.events("attempt") if event["start"] == newer)
    published = [event["time"] for event in user.events("save") if event["start"] == older]
    assert published, "the first start had saved"
    assert max(published) < taken, "an orphan publishes nothing once it is overtaken"
