"""What to keep in the slots, decided without torch: table, policies, strategies, controller."""
