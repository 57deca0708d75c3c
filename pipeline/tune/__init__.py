"""Search by Ray Tune, ``python -m pipeline.tune``: each trial a Ray Train run with its own workers.

Tune schedules: how many trials at a time, and which of them are stopped early. Trials and
their results are in a log of ours (``trials.json``), from which everything else follows: the next
point is a function of the space, the seed and the log, and the scheduler gets its earlier reports
again. So a sweep whose process was killed goes on as if it had not been; Tune's own
snapshots lag some seconds behind, and a trial that ended in between would be done again.

No population based training: it copies checkpoints between trials through Tune, which under Ray
Train V2 sees none, so that its exploit step does nothing and says nothing.
"""
