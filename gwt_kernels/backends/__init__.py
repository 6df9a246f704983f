"""Where a step is computed: the choice of a backend, what a runner is, and the backends."""
