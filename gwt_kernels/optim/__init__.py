"""What users construct, and how its steps are planned."""
