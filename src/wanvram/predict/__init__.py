"""What a run would take, without running it: the one place that builds a simulated device."""
