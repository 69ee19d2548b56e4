"""`python -m bench`: every bench, one after the other."""

from bench import labels, preparation, start_up

start_up.main()
labels.main()
preparation.main()
