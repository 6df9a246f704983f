"""Steps on several processes, beside what the planner predicts of them."""
