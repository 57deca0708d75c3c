"""Many runs by one command, ``python -m pipeline.grid``: each a process, all of them in one Ray.

Why processes: Ray Train's own signal handler wants the main thread, MLflow's tracking address and
torch.export are global to a process, and what kills one driver (memory, a fault in a library) must
not take the others with it. A cell is stopped by SIGTERM, as ``pipeline.train`` is, and stops
itself when the grid's process is gone: its standard input is a pipe that only that process holds.
"""
