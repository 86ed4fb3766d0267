MEMORY_IS = "the caller's"  # read by simulate.timeline
