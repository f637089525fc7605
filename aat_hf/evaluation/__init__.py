"""`aat eval`: what a tolerance costs: predictions by position and synthetic long-context tasks, dense against tiled."""
