MEMORY_IS = "a model's"  # read by simulate.timeline
