"""A run: its flags, its folder with log and checkpoints, where each stage's data comes from, the planner."""
