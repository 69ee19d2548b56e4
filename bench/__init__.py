"""Programs that compare us with others in one interleaved run, and print ratios of medians."""
