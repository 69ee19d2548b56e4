"""`python -m bench`: every bench, one after the other."""

from bench import checkpoints, first_step, kernels, labels, merge, plan, preparation, start_up
from bench.training import __main__ as training

start_up.main()
labels.main()
preparation.main()
merge.main()
plan.main()
checkpoints.main()
first_step.main()
kernels.main()
training.main()  # last: it ends with 3 where losses do not agree
