"""Many trainings: one run as a job, the engines that run jobs, and the grids of sweep and compare."""
