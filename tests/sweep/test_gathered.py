"""Jobs that are refused alike are one line; a pool whose worker was killed goes on with what is left."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool

import pytest
from hydra.core.utils import JobReturn, JobStatus

from kvp.pipeline.experiment import Experiment
from kvp.pipeline.run import run
from kvp.sweep.sweep import SweepFailed, sweep
from kvp.sweep.words import apart, gathered
from tests.helpers.runs import compose_here

WORDS = ["strategy=random", "recovery=none", "evaluation=none", "measure=none", "tracker=none"]


def test_words_that_all_jobs_share_are_left_out():
    jobs = [["a=1", "seed=0", "b=2"], ["a=1", "seed=1", "b=2"], ["a=1", "seed=1", "b=3"]]
    assert apart(jobs) == ["seed=0 b=2", "seed=1 b=2", "seed=1 b=3"]
    assert apart([["a=1", "seed=0"]]) == ["a=1 seed=0"]


@pytest.mark.parametrize(
    ("refused", "jobs", "lines"),
    [
        ([("a", "why")], 1, ["why"]),
        ([("a", "why"), ("b", "why")], 2, ["all 2 jobs: why"]),
        (
            [("a", "why"), ("c", "what"), ("d", "why")],
            9,
            ["2 of 9 jobs: why (a; d)", "1 of 9 jobs: what (c)"],
        ),
        ([(str(n), "why") for n in range(22)], 23, ["22 of 23 jobs: why (0; 1; 2 and 19 more)"]),
    ],
)
def test_equal_reasons_are_one_line(refused, jobs, lines):
    assert gathered(refused, jobs) == lines


def composed(tmp_path, *more):
    return Experiment.compose(compose_here(tmp_path, *WORDS, *more))


def test_fine_jobs_run_beside_refused_ones(tmp_path, capsys):
    ratios = ["0.99", "0.5", "0.98"]
    jobs = [[f"ratio.value={ratio}"] for ratio in ratios]
    experiments = [composed(tmp_path, f"ratio.value={ratio}", "ratio.tolerance=0.001") for ratio in ratios]
    launched = []

    def launch(jobs, initial_job_idx):
        launched.extend(jobs)
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=str(run(experiments[1]).directory))]

    with pytest.raises(SweepFailed, match="2 of 3 jobs failed, 2 of them refused"):
        sweep(jobs, experiments, launch)
    assert launched == [["ratio.value=0.5"]]
    printed = capsys.readouterr().out
    assert printed.index("refused: 1 of 3 jobs: ratio.value=0.99") < printed.index("1 jobs, 0 of them")
    assert "1 of 3 jobs finished" in printed


def test_if_all_jobs_are_refused_nothing_starts(tmp_path):
    experiments = [
        composed(tmp_path, "ratio.value=0.99", "ratio.tolerance=0.001", f"seed={n}") for n in range(3)
    ]
    with pytest.raises(ValueError, match=r"^all 3 jobs: ratio\.value=0\.99 .*nothing was started$"):
        sweep([[f"seed={n}"] for n in range(3)], experiments, lambda *_, **__: pytest.fail("launched"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_killed_worker_ends_its_pool_not_the_sweep(deaths, tmp_path, capsys):
    experiments = [composed(tmp_path, f"ratio.value={ratio}") for ratio in (0.25, 0.5)]
    jobs, launches = [["ratio.value=0.25"], ["ratio.value=0.5"]], []

    def launch(jobs, initial_job_idx):
        launches.append(list(jobs))
        done = [run(experiments[0 if job[0].endswith("0.25") else 1]) for job in jobs[: 3 - len(jobs)]]
        if len(launches) <= deaths:
            raise BrokenProcessPool("a worker was terminated\nor so")
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=str(record.directory)) for record in done]

    sweep(jobs, experiments, launch)
    assert launches[0] == jobs
    assert launches[1] == [["ratio.value=0.5"]]
    printed = capsys.readouterr().out
    assert "a worker was killed, as when memory runs out (a worker was terminated); 1 jobs go on" in printed
    assert "2 of 2 jobs finished" in printed
