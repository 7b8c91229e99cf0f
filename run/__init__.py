"""A run: its settings, its folder, the data of every stage, the planner."""
