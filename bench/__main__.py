"""`python -m bench`: every bench, one after the other."""

from bench import checkpoints, labels, merge, preparation, start_up

start_up.main()
labels.main()
preparation.main()
merge.main()
checkpoints.main()
