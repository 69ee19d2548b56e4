"""Settings, a model's shape and the lengths of the data → whether a run fits, and how long it takes."""
