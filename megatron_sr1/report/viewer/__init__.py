"""The viewer of rollouts and of evaluations: what it shows, its files beside the page, its server."""
