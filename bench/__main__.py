"""`python -m bench`: every bench, one after the other."""

from bench import start_up

start_up.main()
